"""Typed, frozen configuration. Nothing in here imports JAX."""
