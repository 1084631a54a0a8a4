"""Text from a saved checkpoint, token by token.

Each token is drawn from the softmax of the logits divided by the temperature, of the top_k likeliest tokens alone if
that is given. At temperature 0 it is the likeliest one, the first of several equal ones. The model reads a window of
the last tokens, as many as in training, and computes it anew for each token, which is enough for small models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.config.words import check_text
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError, check_not_negative
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.scoring import place_of
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast

LARGEST_SEED = 2**32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How texts are written: at most `tokens` tokens each, `count` texts. top_k: None for all tokens. The n-th text
    depends on `seed` and n, and not on `count`."""

    tokens: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        for option, value in (("--tokens", self.tokens), ("--top-k", self.top_k), ("--count", self.count)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be a whole number above zero; got {value}")
        check_not_negative("--temperature", self.temperature)
        if not 0 <= self.seed < LARGEST_SEED:
            raise ConfigError(f"--seed must be a whole number from 0 to {LARGEST_SEED - 1}; got {self.seed}")
        if self.temperature == 0 and self.count > 1:
            raise ConfigError(f"--count {self.count}: all texts are the same at --temperature 0; leave one of them out")


def sample(
    run: RunConfig, folder: Path, prompt: str, sampling: Sampling, *, step: int | None = None, average: bool = False
) -> tuple[int, list[str]]:
    """The step of a checkpoint of `run` in its `folder`, the newest unless `step` is given, and texts that it writes.

    A text begins with the prompt as its tokens say it. It ends where the model ends a document, or after
    `sampling.tokens` tokens. An empty prompt is the end-of-document token, after which a document begins. average: by
    the average of the weights. Raises UserError if the checkpoint does not exist, its data has changed or has no
    tokenizer, or a logit is not finite.
    """
    check_text("--prompt", prompt)
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    tokenizer = load_tokenizer(data.folder)
    begin = [int(token) for token in tokenizer.encode_batch([prompt.encode()])[0]] or [tokenizer.eos_id]
    writer = Writer(model, tokenizer, run.batch.sequence_length, device, precision, f"step {step} of {folder}")
    texts = []
    for number in range(sampling.count):
        rng = np.random.default_rng((sampling.seed, number))
        texts.append(tokenizer.decode([*begin, *writer.tokens_after(begin, sampling, rng)]))
    return step, texts


@dataclass(frozen=True)
class Writer:
    """A model that writes tokens. max_length: how many it reads. name: of the model in errors."""

    model: Transformer
    tokenizer: Any
    max_length: int
    device: torch.device
    precision: str
    name: str

    def tokens_after(self, begin: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> Iterator[int]:
        """Yield at most `sampling.tokens` tokens after those of `begin`, EOS as the last one if the model draws it.
        Raises UserError if a logit is not finite."""
        tokens, known = list(begin), self.tokenizer.vocab_size
        for _ in range(sampling.tokens):
            with autocast(self.device, self.precision):
                logits_V = next_logits(self.model, tokens[-self.max_length :], self.device)[:known]
            if not np.isfinite(logits_V).all():
                raise UserError(f"{self.name} gives logits that are not finite: has the run diverged?")
            tokens.append(_next(logits_V, sampling, rng))
            yield tokens[-1]
            if tokens[-1] == self.tokenizer.eos_id:
                return


@torch.no_grad()
def next_logits(model: Transformer, tokens: list[int], device: torch.device) -> np.ndarray:
    """The logits [V] of the token after `tokens`, in fp64."""
    tokens_BT = torch.tensor([tokens], dtype=torch.int64, device=device)
    return model.logits(tokens_BT)[0, -1].double().cpu().numpy()


def _next(logits_V: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    likeliest_K = np.argsort(-logits_V, kind="stable")[: sampling.top_k]  # the first of equal ones first
    weights_K = np.exp((logits_V[likeliest_K] - logits_V.max()) / sampling.temperature)
    sums_K = weights_K.cumsum()
    return int(likeliest_K[np.searchsorted(sums_K, rng.random() * sums_K[-1], side="right")])
