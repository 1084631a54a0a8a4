"""A testbed for pretraining small decoder-only language models in grids."""

__version__ = "0.1.0"
