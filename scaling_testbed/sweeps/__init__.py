"""A grid of runs: what is in it, what it costs, where it stands, and who runs it."""
