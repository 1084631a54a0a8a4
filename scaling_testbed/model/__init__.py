"""The decoder-only Transformer: configuration, parts, parametrization, and counts of parameters and FLOPs."""
