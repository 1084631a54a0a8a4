"""Distillation: the student learns the probabilities of a teacher, beside the tokens that came.

The teacher is a finished run. Either it reads each batch too (`teacher`), and the student learns all of its
probabilities, or its likeliest tokens were stored before (`targets`, by `analyze prepare_targets`), and training costs
what it costs without a teacher (Dataset Reinforcement; Faghri et al. 2023, arXiv 2303.08983).
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from scaling_testbed.errors import ConfigError, UserError, check_positive, listed
from scaling_testbed.files import MissingFile, read_json, read_yaml
from scaling_testbed.keys import EXECUTION_ONLY, key
from scaling_testbed.learning.objectives.base import OBJECTIVES, Asked, Built, Given, Objective, Surroundings
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import forward_flops

if TYPE_CHECKING:
    from scaling_testbed.learning.loss import LossTerms
    from scaling_testbed.learning.soft_targets import Teach

RUN_ID = re.compile(r"[0-9a-f]{12}")


@OBJECTIVES.register("distill")
@dataclass(frozen=True, kw_only=True)
class DistillObjective(Objective):
    """(1 - alpha) cross-entropy + alpha T^2 cross-entropy against the teacher at temperature T."""

    looked_up: ClassVar[tuple[str, ...]] = ("teacher_run", "teacher_step", "fingerprint")

    name: str = "distill"
    alpha: float = key(0.5, "The share of the teacher, from 0 to 1. 0: the cross-entropy, bit for bit.")
    temperature: float = key(
        1.0, "T, which divides the logits of teacher and student. Stored targets must have been made at this one."
    )
    targets: str | None = key(
        None,
        "The folder of stored targets, as `analyze prepare_targets` made it for the corpus and the sequences of this "
        "run, or a glob that only this folder matches.",
        identity=EXECUTION_ONLY,
    )
    teacher: str | None = key(
        None,
        "The folder of a finished run, runs_dir/name/run_id, that reads each batch too, in place of targets.",
        identity=EXECUTION_ONLY,
    )
    teacher_run: str | None = key(None, "The run_id of the teacher. It is looked up.")
    teacher_step: int | None = key(None, "The step of the teacher's checkpoint. null: its last one, looked up.")
    fingerprint: str | None = key(None, "The fingerprint of the targets. It is looked up.")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"objective.alpha must be from 0 to 1; got {self.alpha!r}")
        check_positive("objective.temperature", self.temperature)
        if (self.targets is None) == (self.teacher is None):
            raise ConfigError(
                "objective=distill needs objective.targets=FOLDER of `analyze prepare_targets`, or "
                f"objective.teacher=FOLDER of a finished run{', and not both' if self.targets else ''}"
            )
        for field in ("targets", "teacher"):
            if path := getattr(self, field):
                object.__setattr__(self, field, os.path.expanduser(path))
        if self.teacher is not None:
            if self.fingerprint is not None:
                raise ConfigError("objective.fingerprint is that of stored targets, and objective.teacher has none")
            named = Path(os.path.normpath(self.teacher)).name
            if not RUN_ID.fullmatch(named) or self.teacher_run not in (None, named):
                raise ConfigError(
                    f"objective.teacher must be the folder of a run, which is named by its run_id; got {self.teacher!r}"
                    + (f", and objective.teacher_run={self.teacher_run}" if self.teacher_run else "")
                )

    def check(self, asked: Asked) -> None:
        if self.targets is not None and asked.sources:
            raise ConfigError(
                "objective.targets are of one corpus, and data is a mixture; use objective.teacher, which reads each "
                "batch"
            )

    def resolved(self) -> DistillObjective:
        if self.targets is None:
            folder = Path(str(self.teacher))
            return dataclasses.replace(
                self, teacher_run=Path(os.path.normpath(folder)).name, teacher_step=self.teacher_step or _last(folder)
            )
        if self.teacher_run and self.teacher_step is not None and self.fingerprint:
            return self
        manifest = _manifest(self._folder)
        found = {
            "teacher_run": manifest["teacher"]["run_id"],
            "teacher_step": manifest["teacher"]["step"],
            "fingerprint": manifest["fingerprint"],
        }
        for name, value in found.items():
            if (typed := getattr(self, name)) not in (None, value):
                raise ConfigError(f"objective.{name}={typed}, and objective.targets={self.targets} has {value}")
        return dataclasses.replace(self, **found)

    @property
    def reads_run(self) -> tuple[Path, int] | None:
        if self.teacher is None or self.teacher_step is None or not self.alpha:
            return None
        return Path(self.teacher), self.teacher_step

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        if self.teacher is None or not self.alpha:
            return 0
        return forward_flops(_model_of(self.teacher).resolved(model.known_vocab_size), sequence_length)

    def bytes_kept(self, model: ModelConfig) -> int:
        if self.teacher is None or not self.alpha:
            return 0
        from scaling_testbed.model.counting import count_params

        return 4 * count_params(_model_of(self.teacher).resolved(model.known_vocab_size)).n_params

    def build(self, surroundings: Surroundings) -> Built:
        if not self.alpha:
            return Built()
        if self.targets is not None:
            targets = surroundings.open_targets(self._folder)
            manifest = targets.manifest
            if manifest["fingerprint"] != self.fingerprint:
                raise UserError(
                    f"objective.targets={self.targets} has the fingerprint {manifest['fingerprint']}, and this run is "
                    f"of {self.fingerprint}; restore the targets, or leave objective.fingerprint out for a new run"
                )
            if manifest["temperature"] != self.temperature:
                raise ConfigError(
                    f"objective.temperature={self.temperature:g}, and objective.targets={self.targets} has "
                    f"probabilities at {manifest['temperature']:g}; make targets with --temperature "
                    f"{self.temperature:g}"
                )
            stored = {"pass_flops": manifest["pass_flops"], "top_k": manifest["top_k"]}
            return Built(terms=self._terms_of_stored, beside=targets, teacher=manifest["teacher"] | stored)
        assert self.reads_run is not None, "`resolved` has found the step"
        teacher, about = surroundings.load_model(*self.reads_run)

        def terms(given: Given) -> LossTerms:
            import torch

            from scaling_testbed.learning.soft_targets import Full

            with torch.no_grad():
                hidden_ND = teacher(given.tokens_BS[:, :-1], given.begins_BT).flatten(0, 1)
                full = Full.of(hidden_ND, teacher.head_weight_VD, teacher.config.final_softcap, self.temperature)
            return self._terms(given, full)

        return Built(terms=terms, teacher=about)

    def _terms_of_stored(self, given: Given) -> LossTerms:
        from scaling_testbed.learning.soft_targets import Stored

        ids, log_p = given.beside["target_ids"], given.beside["target_log_p"]
        return self._terms(given, Stored(ids.flatten(0, 1), log_p.flatten(0, 1)))

    def _terms(self, given: Given, teach: Teach) -> LossTerms:
        from scaling_testbed.learning.loss import LossTerms, z_loss_of
        from scaling_testbed.learning.soft_targets import soft_cross_entropy

        found = soft_cross_entropy(
            given.hidden_BTD.flatten(0, 1),
            given.weight_VD,
            given.targets_BT.flatten(),
            teach,
            alpha=self.alpha,
            temperature=self.temperature,
            z_loss=given.loss.z_loss,
            softcap=given.softcap,
            chunk_bytes=None if given.loss.chunk_mib is None else given.loss.chunk_mib * 2**20,
        )
        z_loss = z_loss_of(given.loss, found.log_z_N)
        return LossTerms(found.loss, found.ce_sum, z_loss, given.valid_BT.sum(), found.value)

    @property
    def _folder(self) -> Path:
        """The folder of the targets. Raises ConfigError unless the glob names one."""
        found = sorted(glob.glob(str(self.targets))) or [str(self.targets)]
        if len(found) > 1:
            raise ConfigError(f"objective.targets={self.targets} matches {listed(found)}; name one folder")
        return Path(found[0])


def _manifest(folder: Path) -> dict[str, Any]:
    """What objective.targets says of itself. Its hash is checked when it is opened."""
    again = "make the targets by `analyze prepare_targets`, which goes on where it was stopped"
    try:
        found: dict[str, Any] = read_json(folder / "manifest.json", advice=again)
    except MissingFile as error:
        raise ConfigError(f"objective.targets={folder} has no whole targets: {error}; {again}") from None
    try:
        return {"fingerprint": found["fingerprint"], "teacher": {k: found["teacher"][k] for k in ("run_id", "step")}}
    except (LookupError, TypeError):
        raise ConfigError(f"objective.targets={folder} is no folder of `analyze prepare_targets`") from None


def _last(folder: Path) -> int:
    """The last step of a finished run. Raises ConfigError if it has not finished."""
    try:
        row = read_json(folder / "result.json")
        if row["status"] == "finished":
            return int(row["steps"])
        said = f"it is {row['status']}"
    except MissingFile:
        said = "it has no row" if folder.is_dir() else "there is no such folder"
    except (UserError, LookupError, TypeError, ValueError):
        said = "its result.json is damaged"
    raise ConfigError(f"objective.teacher={folder} is no finished run: {said}")


@functools.cache
def _model_of(folder: str) -> ModelConfig:
    """The model of the run in a folder. Raises ConfigError if it is not recorded there."""
    try:
        return ModelConfig(**read_yaml(Path(folder) / "config.yaml")["model"])
    except (OSError, LookupError, TypeError) as error:
        raise ConfigError(f"objective.teacher={folder}/config.yaml has no model that is known here: {error}") from None
