"""The engine as a server. Needs the extra `serve`."""
