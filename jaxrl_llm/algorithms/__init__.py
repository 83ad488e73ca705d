"""Equations of reinforcement learning as pure functions: arrays in, arrays out."""
