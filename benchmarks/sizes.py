"""The models and batches at which a step is measured: in benchmarks/steps.py, and traced in tests/cuda_trace."""

from __future__ import annotations

# With the setting in which each size is trained: small_scale_proxies_gpu_hour, over_training, and GPT-2's vocabulary.
SIZES = {
    "proxy_2m": [
        "model=proxy_2m",
        "data.vocab_size=257",
        "batch.sequences=32",
        "batch.sequence_length=512",
    ],
    "openlm_11m": [
        "model=openlm_11m",
        "data.vocab_size=50432",
        "batch.sequences=64",
        "batch.sequence_length=2048",
    ],
    "openlm_154m": [
        "model=openlm_154m",
        "data.vocab_size=50432",
        "batch.sequences=32",
        "batch.micro_batch_sequences=16",
        "batch.sequence_length=2048",
    ],
    "10m": [
        "model=nano_m",
        "model.d_model=256",
        "model.n_layers=8",
        "model.n_heads=4",
        "data.vocab_size=50304",
        "batch.sequences=128",
        "batch.micro_batch_sequences=32",
        "batch.sequence_length=1024",
    ],
    "124m": [
        "model=proxy_85m",
        "model.tied_head=true",
        "data.vocab_size=50304",
        "batch.sequences=64",
        "batch.micro_batch_sequences=32",
        "batch.sequence_length=1024",
    ],
    "1.3b": [
        "model=proxy_1b",
        "model.tied_head=true",
        "data.vocab_size=50304",
        "batch.sequences=8",
        "batch.micro_batch_sequences=4",
        "batch.sequence_length=2048",
    ],
}
