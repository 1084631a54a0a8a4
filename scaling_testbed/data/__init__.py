"""From a source of text or tokens to batches: sources, tokenizers, shards on disk, and batches addressed by step."""
