"""Several optimizers as one, each over parameters of its own."""

from collections.abc import Sequence

import torch


class Combined(torch.optim.Optimizer):
    """Its groups and its state are those of its parts, so that rates are set, saved and restored as for a single one.

    parts: optimizers whose steps do not depend on one another; they step in this order.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no closure
        self._share()
        for part in self.parts:
            part.step()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state, which `load_state_dict` puts others in place of."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end
