"""A mixture: several sources, each prepared on its own, that give the rows of the training batches by their weights.

The folder of a mixture holds no shards. Its manifest names those of the sources, and has the manifest of each.
"""

import functools
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scaling_testbed.data.manifest import MASK, SPLITS, read_manifest
from scaling_testbed.data.online import OnlineRule, read_rule
from scaling_testbed.data.sources.source import OF_THE_RUN, SOURCES, Job, Source
from scaling_testbed.data.tokenizers import TOKENIZER_FILE, TokenizerConfig
from scaling_testbed.errors import ConfigError, listed
from scaling_testbed.keys import ADDED_LATER, key

# Fields that decide which tokens a step is trained on, and not which there are.
WEIGHTING = ("weights", "temperature", "weight_changes", "online")
NAME = "[A-Za-z0-9_-]+"


@SOURCES.register("mixture")
@dataclass(frozen=True, kw_only=True)
class MixtureConfig(Source):
    """Several sources in shares that weights say."""

    name: str = "mixture"
    sources: dict[str, Any] = key(
        {},
        "The sources: a name for each, and its settings, {NAME: {name: CHOICE, KEY: VALUE}}. CHOICE is one of data=, "
        "and KEY one of its keys. All must have the same tokenizer.",
        settings_of="data",
        free_names=True,
    )
    weights: dict[str, float] = key(
        {},
        "The weight of each source: the part of the rows that it gives is its weight divided by the sum of all. Empty: "
        "by `temperature`.",
        free_names=True,
    )
    temperature: float = key(
        1.0,
        "T of the weights n^(1/T), where n is the number of training tokens of a source. 1: in proportion to the "
        "tokens. Large: nearly equal. It cannot be with `weights`.",
    )
    weight_changes: list[Any] = key(
        [],
        "Weights that replace the earlier ones from a step on, in rising order: [{step: 500, weights: {NAME: .2, "
        "OTHER: .8}}].",
    )
    online: dict[str, Any] = key(
        {},
        "Weights that follow from the losses on the sources while the run trains, {every_steps: 100, eta: .5, window: "
        "3, floor: .01, score: excess, over: {NAME: RUN}, matrix: {NAME: {OTHER: 1}}}; see docs/data.md. {}: none.",
        identity=ADDED_LATER,
        free_names=True,
    )

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("data.sources must name a source, such as 'data.sources={code: {name: sympy}}'")
        if odd := [name for name in self.sources if not re.fullmatch(NAME, name)]:
            raise ConfigError(f"sources: the name {odd[0]!r} must have only letters, digits, - and _")
        if split := [name for name in self.sources if name in SPLITS]:
            raise ConfigError(f"sources: {split[0]} is the name of a split; choose another")
        self._parts  # noqa: B018 (their settings are checked)
        if self.weights:
            self._check_weights("weights", self.weights)
            if self.temperature != 1.0:
                raise ConfigError(f"temperature={self.temperature} cannot be with weights; leave one out")
        if not (0 < self.temperature < math.inf):
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        last = 0
        for at, change in enumerate(self.weight_changes):
            where = f"weight_changes[{at}]"
            if not isinstance(change, Mapping) or set(change) != {"step", "weights"}:
                raise ConfigError(f"{where} must be {{step: STEP, weights: {{NAME: WEIGHT}}}}, got {change!r}")
            step = change["step"]
            if not isinstance(step, int) or isinstance(step, bool) or step <= last:
                raise ConfigError(f"{where}.step must be a whole number above {last}, got {step!r}")
            self._check_weights(f"{where}.weights", change["weights"])
            last = step
        if self.online_rule is not None:
            if self.weight_changes:
                raise ConfigError(
                    "data.weight_changes cannot be with data.online, which changes the weights; leave one out"
                )
            if zero := [name for name, weight in self.weights.items() if not weight]:
                raise ConfigError(
                    f"data.weights.{zero[0]}=0 cannot be with data.online, which gives each source a weight; leave the "
                    "source out of data.sources"
                )

    def _check_weights(self, where: str, weights: Any) -> None:
        """Raise ConfigError unless each source has a weight that is not negative, and one has a positive weight."""
        if not isinstance(weights, Mapping):
            raise ConfigError(f"{where} must be a mapping of sources to weights, got {weights!r}")
        if unknown := [name for name in weights if name not in self.sources]:
            known = listed(sorted(self.sources))
            raise ConfigError(f"data.{where}.{unknown[0]} is no source; data.sources has {known}")
        if missing := [name for name in sorted(self.sources) if name not in weights]:
            raise ConfigError(f"{where} has no {missing[0]}; each source needs a weight, and 0 leaves it out")
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < math.inf:
                raise ConfigError(f"{where}.{name} must be a number that is not negative, got {weight!r}")
        if not any(weights.values()):
            raise ConfigError(f"{where} must have a positive weight, got {dict(weights)}")

    @functools.cached_property
    def _parts(self) -> dict[str, Source]:
        return {name: self._part(name) for name in sorted(self.sources)}

    @functools.cached_property
    def online_rule(self) -> OnlineRule | None:  # type: ignore[override]  # it depends on the keys
        return read_rule(self.online, self._parts) if self.online else None

    def _part(self, name: str) -> Source:
        where, settings = f"sources.{name}", self.sources[name]
        if not isinstance(settings, Mapping) or settings.get("kind") not in SOURCES:
            raise ConfigError(f"{where} must be settings of a source, {{name: CHOICE, KEY: VALUE}}; got {settings!r}")
        try:
            part = SOURCES[settings["kind"]](**{k: v for k, v in settings.items() if k != "kind"})
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{where}.{error}") from None
        if part.parts():
            raise ConfigError(f"data.{where} is a mixture; name its sources in data.sources")
        if part.skip_steps:
            raise ConfigError(f"data.{where}.skip_steps cannot be; data.skip_steps leaves out whole batches")
        return part

    def parts(self) -> Mapping[str, Source]:
        return self._parts

    @property
    def uses_tokenizer(self) -> bool:  # type: ignore[override]  # it depends on the sources
        return any(part.uses_tokenizer for part in self._parts.values())

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary, where a source says it."""
        return next((found for part in self._parts.values() if (found := getattr(part, "vocab_size", None))), None)

    def weights_by_step(self, train_tokens: Mapping[str, int]) -> list[tuple[int, dict[str, float]]]:
        by_size = {name: train_tokens[name] ** (1 / self.temperature) for name in self._parts}
        later = [(change["step"], dict(change["weights"])) for change in self.weight_changes]
        return [(0, dict(self.weights) or by_size), *later]

    def check_tokenizer(self, tokenizer: TokenizerConfig) -> None:
        if tokenizer is not None and self.uses_tokenizer and tokenizer.sample_bytes and len(self._parts) > 1:
            raise ConfigError(
                f"tokenizer={tokenizer.name} is trained on each source by itself, and a mixture needs one tokenizer; "
                "prepare one corpus with it, and type tokenizer=pretrained tokenizer.path=data/FOLDER/tokenizer.json"
            )

    def identity(self) -> dict:
        return {"kind": self.kind, "sources": {name: part.identity() for name, part in self._parts.items()}}

    def settings(self) -> dict:
        return {"kind": self.kind, "sources": {name: part.settings() for name, part in self._parts.items()}}

    def inputs(self) -> dict[str, list[str]] | None:
        found: dict[str, list[str]] = {}
        for name, part in self._parts.items():
            if (there := part.inputs()) is None:
                return None
            found |= {f"{name}/{role}": paths for role, paths in there.items()}
        return found

    def description(self) -> dict:
        left_out = {*OF_THE_RUN, *WEIGHTING}
        return {"kind": self.kind, "fields": {k: v for k, v in asdict(self).items() if k not in left_out}}

    def where(self) -> str:
        return ", ".join(f"{name}: {part.where()}" for name, part in self._parts.items())

    def prepare(self, job: Job) -> dict:
        manifests = {name: read_manifest(job.parts[name]) for name in self._parts}
        first, common = next(iter(manifests.items()))
        for name, manifest in manifests.items():
            if alike := [other for other in manifests if other < name and job.parts[other] == job.parts[name]]:
                raise ConfigError(f"data.sources.{alike[0]} and data.sources.{name} are the same corpus; leave one out")
            for what in ("tokenizer_fingerprint", "vocab_size"):
                if manifest[what] != common[what]:
                    raise ConfigError(
                        f"data.sources.{name} has another tokenizer than data.sources.{first}: its {what} is "
                        f"{manifest[what]}, and there {common[what]}; a mixture needs one tokenizer"
                    )
        if (file := job.parts[first] / TOKENIZER_FILE).exists():
            shutil.copyfile(file, job.work / TOKENIZER_FILE)
        lost = [f"{name}: {said}" for name, m in manifests.items() if (said := (m.get("text_check") or {}).get("lost"))]
        eos_ids = {manifest["eos_id"] for manifest in manifests.values()}
        return {
            "source": self.description(),
            **{what: common[what] for what in ("tokenizer", "tokenizer_fingerprint", "vocab_size", "dtype")},
            "eos_id": eos_ids.pop() if len(eos_ids) == 1 else None,
            "unigram_entropy_nats": None,  # it depends on the weights
            "entropy_rate_nats": None,
            "skipped_files": sum(manifest.get("skipped_files", 0) for manifest in manifests.values()),
            "text_check": {"lost": "; ".join(lost)} if lost else None,
            "splits": {split: _joined(split, manifests, job.parts) for split in SPLITS},
            "sources": {name: {"folder": job.parts[name].name, **manifest} for name, manifest in manifests.items()},
        }


def _joined(split: str, manifests: Mapping[str, dict], folders: Mapping[str, Any]) -> dict:
    """The record of a split of all sources, one after the other."""
    records = {name: manifest["splits"][split] for name, manifest in manifests.items()}
    found: dict[str, Any] = {"shards": []}
    for what in ("n_tokens", "n_documents", "n_bytes"):
        numbers = [record[what] for record in records.values()]
        found[what] = None if None in numbers else sum(numbers)
    for name, record in records.items():
        found["shards"] += [_beside(shard, folders[name].name) for shard in record["shards"]]
    if any("n_targets" in record for record in records.values()):
        found["n_targets"] = sum(record.get("n_targets", record["n_tokens"]) for record in records.values())
    return found


def _beside(entry: dict, folder: str) -> dict:
    """The entry of a file of a source. It lies beside the folder of the mixture, so that all can be moved together. A
    user's own token files have absolute paths."""
    file = entry["file"] if entry["file"].startswith("/") else f"../{folder}/{entry['file']}"
    mask = {} if (there := entry.get(MASK)) is None else {MASK: _beside(there, folder)}
    return {**entry, "file": file, **mask}
