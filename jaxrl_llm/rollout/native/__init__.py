"""The JAX engine: continuous batching in compiled programs over paged keys and values."""
