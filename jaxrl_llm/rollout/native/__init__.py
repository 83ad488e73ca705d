"""The JAX engine: continuous batching in compiled programs over pages."""
