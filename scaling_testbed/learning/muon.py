"""Muon and AdamW as one optimizer, each over parameters of its own."""

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon over the groups `hidden`, torch.optim.AdamW over `others`; `muon` and `adamw` are their options.

    Its groups and its state are those of the two, so that rates are set, saved and restored as for a single one.
    """

    def __init__(self, hidden: list[dict], others: list[dict], muon: dict, adamw: dict):
        parts = [torch.optim.AdamW(others, **adamw)]
        if hidden:  # a model may have no blocks
            parts.append(torch.optim.Muon(hidden, **muon))
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure=None):
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
