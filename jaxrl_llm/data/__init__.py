"""The records that flow through a step, and where questions come from."""
