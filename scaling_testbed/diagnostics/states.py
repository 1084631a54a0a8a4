"""The hidden states of forward passes, taken by hooks that do not change them.

Shapes in names: B sequences, T positions, D model width.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from scaling_testbed.kernels.reference import wide
from scaling_testbed.model.transformer import Transformer

FIRST, LAST = "embedding", "final"


class Hooked:
    """A context that holds forward hooks until it is left."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hook(self, module: nn.Module, action: Callable[..., Any]) -> None:
        handle = module.register_forward_hook(action, with_kwargs=False)
        self._stack.callback(handle.remove)


class States(Hooked):
    """A context in which every forward pass of `model` leaves its hidden states [B, T, D], wide, in `found`.

    layers: names of `layers_of`. The states of a pass replace those of the pass before.
    """

    def __init__(self, model: Transformer, layers: list[str]):
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}
        blocks = {str(number): block for number, block in enumerate(model.blocks)}
        self._places: dict[str, nn.Module] = {FIRST: model.embedding, **blocks, LAST: model.final_norm}
        self._layers = layers

    def __enter__(self) -> Self:
        for layer in self._layers:
            self._hook(self._places[layer], partial(self._keep, layer))
        return self

    def _keep(self, layer: str, _module: nn.Module, _inputs: Any, output_BTD: torch.Tensor) -> None:
        self.found[layer] = wide(output_BTD.detach())


def layers_of(n_layers: int) -> list[str]:
    """The places of hidden states: after the embedding, after each block by its number from 0 on, and after the final
    norm, where the head reads them."""
    return [FIRST, *map(str, range(n_layers)), LAST]
