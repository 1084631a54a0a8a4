"""Small models for the tests of this folder."""

from pathlib import Path

import pytest
import torch
import yaml

from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.transformer import Transformer

MODEL_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
VOCAB_SIZE = 61


@pytest.fixture
def tiny():
    """tiny(**changes) -> a resolved config of a model of a few thousand parameters, with 4 heads of 8."""

    def make(**changes) -> ModelConfig:
        changes = {"d_model": 32, "n_layers": 2, "n_heads": 4, **changes}
        return ModelConfig(**changes).resolved(VOCAB_SIZE)

    return make


@pytest.fixture
def build(tiny):
    """build(**changes) -> an initialised model of tiny(**changes)."""

    def make(
        parametrization: str = "standard", seed: int = 0, base_width: int = 256, device: str = "cpu", **changes
    ) -> Transformer:
        config = ParametrizationConfig(name=parametrization, base_width=base_width)
        model = Transformer(tiny(**changes), config, device=device)
        model.init_weights(seed)
        return model

    return make


@pytest.fixture
def tokens():
    """tokens(T, B=2, vocab_size=...) -> random ids [B, T], the same each time."""

    def make(length: int, rows: int = 2, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
        return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture
def from_yaml():
    """from_yaml(name) -> ModelConfig of configs/model/<name>.yaml, read without Hydra."""

    def read(name: str) -> dict:
        values = yaml.safe_load((MODEL_CONFIGS / f"{name}.yaml").read_text())
        parents = [entry for entry in values.pop("defaults") if not entry.startswith("/schema/")]
        return {key: value for parent in parents for key, value in read(parent).items()} | values

    return lambda name: ModelConfig(**read(name))
