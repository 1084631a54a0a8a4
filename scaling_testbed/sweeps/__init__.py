"""Sweeps, which are grids of runs: sweep files, plans with costs, status, and drivers that run them."""
