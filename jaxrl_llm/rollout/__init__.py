"""Engines that turn prompts into completions, behind one small protocol."""
