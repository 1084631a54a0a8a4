"""What the rows of a sweep say. Nothing here is imported by training."""
