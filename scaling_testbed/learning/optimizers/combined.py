"""Several optimizers as one. Each updates its own parameters."""

from collections.abc import Sequence

import torch


class Combined(torch.optim.Optimizer):
    """Several optimizers with common groups and state, so that rates and state are handled as for one optimizer.

    parts: optimizers whose steps do not depend on one another. They step in this order.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        self._share()
        for part in self.parts:
            part.step()

    def _share(self) -> None:
        """Give the parts this optimizer's groups and state, because `load_state_dict` replaces both by new objects."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end
