"""Negative preference optimization, and the losses at the start that it compares with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.files import write_bytes
from scaling_testbed.keys import key
from scaling_testbed.learning.objectives.base import OBJECTIVES, Asked, Surroundings
from scaling_testbed.learning.objectives.unlearning import Part, Rows, Unlearning, batches_of

FILE = "reference_losses.bin"  # in the folder of the run


@OBJECTIVES.register("npo")
@dataclass(frozen=True, kw_only=True)
class NPO(Unlearning):
    """F is the mean over documents of -(2 / beta) log sigmoid(beta (NLL - NLL at the start)), where NLL is the sum of
    the cross-entropy over the targets of a document (Zhang et al. 2024, arXiv 2404.05868, section 3). Its gradient
    fades as a document becomes less likely than it was at the start.

    NLL at the start is that of the weights in which the run begins. It is computed once and stored in the run's folder.
    """

    name: str = "npo"
    beta: float = key(0.1, "The larger it is, the sooner a document counts as forgotten. Near 0 it is gradient ascent.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def check(self, asked: Asked) -> None:
        super().check(asked)
        if not asked.begins_in_run:
            raise ConfigError(
                f"objective={self.name} compares with the weights in which a run begins; type start.run=FOLDER, the "
                "folder of a finished run"
            )
        if asked.grows:
            raise ConfigError(f"objective={self.name} cannot be with start.grow, which makes other weights; grow first")

    def part(self, role: str, rows: Rows) -> Part:
        import torch.nn.functional as F

        reference_BT = rows.beside["reference"].to(rows.ce_BT.dtype)
        above_BT = self.beta * rows.sums(rows.ce_BT - reference_BT)
        weights_BT = -2 * (-above_BT).sigmoid() * rows.valid_BT
        return Part(weights_BT, rows.once(-2 / self.beta * F.logsigmoid(above_BT)))

    def arrays(self, surroundings: Surroundings) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        stream, path = surroundings.streams[self.forget], surroundings.folder / FILE
        about = {"start": dict(surroundings.start or {}), "source": self.forget, "data": stream.data_fingerprint}

        def write() -> None:
            if not path.exists():
                losses = surroundings.losses_at_start()
                write_losses(path, np.concatenate([losses(batch) for batch in batches_of(stream)]), about)

        surroundings.on_main(write)
        losses_NT, sha256 = read_losses(path, about)
        return {"reference": losses_NT}, {"reference_sha256": sha256}


def write_losses(path: Path, losses_NT: np.ndarray, about: Mapping[str, object]) -> None:
    """Write the losses of all targets to forget, and what they are of: the sha256 of the rest, a line of JSON, and the
    numbers in fp32."""
    line = json.dumps({"about": about, "shape": losses_NT.shape})
    content = line.encode() + b"\n" + losses_NT.astype("<f4").tobytes()
    write_bytes(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_losses(path: Path, about: Mapping[str, object]) -> tuple[np.ndarray, str]:
    """The losses in a file, fp32 [N, T], and their sha256. Raises UserError if it is damaged, or of other weights or
    sequences."""
    again = "delete it, and it is computed again from start.run"
    try:
        digest, content = path.read_bytes().split(b"\n", 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {again}") from None
    except ValueError:
        digest, content = b"", b""
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256.encode() != digest:
        raise UserError(f"{path} is damaged: its hash is another one; {again}")
    line, numbers = content.split(b"\n", 1)
    head = json.loads(line)
    if head["about"] != about:
        raise UserError(f"{path} has the losses of other weights or sequences, {head['about']}; {again}")
    return np.frombuffer(numbers, dtype="<f4").reshape(head["shape"]), sha256
