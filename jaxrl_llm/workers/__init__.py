"""Processes that run other people's code and can be killed."""
