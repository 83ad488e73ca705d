"""Engines that are servers: processes, transfer of weights, verification."""
