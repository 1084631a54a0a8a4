"""Analysis of the rows of a sweep. Training imports nothing from this package."""
