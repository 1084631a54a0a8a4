"""The decoder-only Transformer: its config, its parts, its parametrization and its counts."""
