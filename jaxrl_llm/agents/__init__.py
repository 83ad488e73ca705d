"""Episodes of several turns: environments, tools, and their words as tokens."""
