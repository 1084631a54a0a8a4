"""What decides the numbers of a run besides its configuration: its corpus, its evaluation sets, its tasks and its
plug-ins.

A row and a checkpoint have fingerprints of them. Every command compares these with what is at hand before it serves a
finished row or continues a run. No document of a corpus is read for it: a corpus that is prepared answers by its
manifest and the sizes and times of its shards, and else its files are compared by size and time, and by their hash
where these changed. Files of tasks are hashed.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_testbed.config.run import RunConfig, flatten, run_id
from scaling_testbed.config.start import checkpoint_of
from scaling_testbed.data.manifest import read_manifest
from scaling_testbed.data.preparing import inputs as files_of
from scaling_testbed.data.preparing.preparation import look, prepared_folders
from scaling_testbed.data.shards import PreparedData, changed_shard, data_fingerprint
from scaling_testbed.errors import UserError, first_line
from scaling_testbed.files import read_json, sha256_of, sha256_of_input
from scaling_testbed.plugins import difference, hashes

TO_DO = "restore what has changed, or give another name= for new runs"
# Bytes that are hashed although sizes and times are as before. Without the prepared corpus, only a hash shows an edit
# whose time was set back.
MOST_HASHED = 64 << 20
SHOWN = 1  # differences that a message names; the others are counted


def recorded(
    run: RunConfig, data: PreparedData, sets: Mapping[str, PreparedData], tasks: Mapping[str, str]
) -> dict[str, Any]:
    """What a row and a checkpoint record of the data of `run`. sets: the corpora of evaluation.sets, by name. tasks:
    the sha256 of the tasks of evaluation.tasks, by name."""
    return {
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "data_folder": data.folder.name,
        "data_inputs": data.manifest.get("inputs"),
        "evaluation_data": {name: sets[name].fingerprint for name in run.evaluation.sets},
        "task_data": dict(tasks),
    }


@dataclass(frozen=True)
class Found:
    """The result of a comparison. changed: what is another now. unknown: what could not be compared, and why. Both are
    None if all is the same."""

    changed: str | None = None
    unknown: str | None = None


_KINDS: dict[str, type] = dict.fromkeys(("data_fingerprint", "tokenizer_fingerprint", "data_folder"), str) | (
    dict.fromkeys(("data_inputs", "evaluation_data", "task_data", "plugins", "teacher"), dict) | {"lineage": list}
)


class AtHand:
    """The data and the plug-ins at hand. Each corpus is looked at once, so use a new object for each command."""

    def __init__(self) -> None:
        self._corpora: dict[str, _Corpus] = {}
        self._sha256 = functools.cache(sha256_of_input)

    def compare(self, then: Mapping[str, Any], run: RunConfig) -> Found:
        """Compare what a row or a checkpoint of `run` recorded with what is at hand."""
        then = {key: value for key, value in then.items() if isinstance(value, _KINDS.get(key, ()))}
        changed, unknown = [], []
        for found in (
            self._corpus(then, run),
            *_sets(then, run),
            *self._tasks(then, run),
            _plugins(then, run),
            _start(then),
            _teacher(then, run),
        ):
            changed += [found.changed] if found.changed else []
            unknown += [found.unknown] if found.unknown else []
        return Found("; ".join(changed) or None, "; ".join(unknown) or None)

    def _corpus(self, then: Mapping[str, Any], run: RunConfig) -> Found:
        key = repr((run.data_dir, run.data.name, run.data.description(), run.tokenizer))
        if key not in self._corpora:
            self._corpora[key] = _Corpus(run)
        return self._corpora[key].compare(then)

    def _tasks(self, then: Mapping[str, Any], run: RunConfig) -> Iterator[Found]:
        """The files of tasks. Those that are made of the corpus follow from it and from keys."""
        for path in run.evaluation.task_files:
            key, was = f"evaluation.tasks: {path}", (then.get("task_data") or {}).get(path.stem)
            try:
                now = self._sha256(path)
            except UserError as error:
                yield Found(unknown=f"evaluation.tasks: {first_line(error)}")
                continue
            if was is None:
                yield Found(unknown=f"{key}: its row does not say which documents it was scored on")
            elif now != was:
                shown = f"{key} has the sha256 {now[:12]}, and it had {str(was)[:12]}"
                yield Found(f"was scored on other documents: {shown}")


def check_same(then: Mapping[str, Any], run: RunConfig, folder: Path) -> str | None:
    """Raise UserError if what the run in `folder` recorded is another now. Returns what could not be compared."""
    found = AtHand().compare(then, run)
    if found.changed:
        raise UserError(f"{folder} {found.changed}; {TO_DO}, or delete the folder to train it again")
    return found.unknown


def of_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint of the run in `folder` recorded, of those whose state has the hash in their manifest;
    None if there is none."""
    for path in sorted((folder / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True):
        with contextlib.suppress(OSError, UserError, LookupError, TypeError):
            if sha256_of(path / "state.json") == read_json(path / "manifest.json")["files"]["state.json"]["sha256"]:
                state: dict[str, Any] = read_json(path / "state.json")
                return state
    return None


def weights_sha256(checkpoint: Path) -> str:
    """The sha256 of the file of weights of a checkpoint, or of the hashes of its shards, from its manifest. Raises
    UserError if it has none."""
    try:
        files = read_json(checkpoint / "manifest.json")["files"]
        hashes = {name: entry["sha256"] for name, entry in files.items()}
        if "model.pt" in hashes:
            return str(hashes["model.pt"])
    except (LookupError, TypeError, AttributeError):
        hashes = {}
    shards = sorted(item for item in hashes.items() if item[0].startswith("shards/"))
    if not shards:
        raise UserError(f"checkpoint {checkpoint} has no weights in its manifest.json")
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def check_own(row: Mapping[str, Any] | None, run: RunConfig, folder: Path) -> None:
    """Raise UserError, with what differs in the configurations, if `row` in the folder of `run` is of another run."""
    if row is None or row["run_id"] == run_id(run):
        return
    now = {key: value for key, value in flatten(run).items() if key in row and ("." in key or key == "seed")}
    other = [f"{key} is {row[key]!r} there and {value!r} here" for key, value in now.items() if row[key] != value]
    differs = f": {_few(other)}" if other else ""
    raise UserError(
        f"{folder} holds the records of run {row['run_id']}{differs}; rename the folder to that id, or delete it"
    )


def _plugins(then: Mapping[str, Any], run: RunConfig) -> Found:
    problem = difference(then.get("plugins"), hashes(run.plugins))
    return Found(problem and f"was made with other code: {problem}")


def _start(then: Mapping[str, Any]) -> Found:
    """The weights that the run began with. A parent may delete its checkpoints: the row keeps their sha256."""
    if not then.get("lineage"):
        return Found()
    parent = then["lineage"][-1]
    try:
        was, path = parent.get("weights_sha256"), checkpoint_of(Path(parent["folder"]), int(parent["step"]))
        now = weights_sha256(path)
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return Found()
    if was in (None, now):
        return Found()
    return Found(f"began with other weights: those of {path} have the sha256 {now[:12]}, and they had {str(was)[:12]}")


def _teacher(then: Mapping[str, Any], run: RunConfig) -> Found:
    """The weights of the run that the objective reads. It may delete its checkpoints too."""
    was = then.get("teacher", {}).get("weights_sha256")
    if run.objective.reads_run is None or was is None:
        return Found()
    path = checkpoint_of(*run.objective.reads_run)
    try:
        now = weights_sha256(path)
    except UserError:
        return Found()
    if was == now:
        return Found()
    return Found(f"had another teacher: the weights in {path} have the sha256 {now[:12]}, and they had {str(was)[:12]}")


def _sets(then: Mapping[str, Any], run: RunConfig) -> Iterator[Found]:
    for name, path in run.evaluation.sets.items():
        key, was = f"evaluation.sets.{name}={path}", (then.get("evaluation_data") or {}).get(name)
        if was is None:
            yield Found(unknown=f"{key}: a run of an earlier version does not say which data it was evaluated on")
            continue
        try:
            manifest = read_manifest(Path(path))
        except UserError as error:
            yield Found(unknown=f"{key}: {first_line(error)}")
            continue
        if (now := data_fingerprint(manifest)) != was:
            yield Found(f"was evaluated on other data: {key} has the fingerprint {now}, and it had {was}")
        elif shard := changed_shard(Path(path), manifest):
            yield Found(f"was evaluated on other data: {key}: {shard}")


class _Corpus:
    """The training and validation data of runs with equal `data`, `tokenizer` and `data_dir`, as they are now."""

    def __init__(self, run: RunConfig):
        self._source, self._tokenizer, self._data_dir = run.data, run.tokenizer, Path(run.data_dir)
        self._missing: str | None = None
        try:
            found = look(run.data, run.tokenizer, self._data_dir)
            self._name, self._inputs, self._folder, self._problem = (
                found.name,
                found.inputs,
                found.folder,
                found.problem,
            )
            self._manifest = read_manifest(found.folder) if found.folder else {}
            self._shard = changed_shard(found.folder, self._manifest) if found.folder else None
        except UserError as error:
            self._missing = first_line(error)
        self._known: dict[str, Found] = {}

    def compare(self, then: Mapping[str, Any]) -> Found:
        keys = ("data_fingerprint", "tokenizer_fingerprint", "data_folder", "data_inputs")
        key = repr([then.get(key) for key in keys])
        if key not in self._known:
            self._known[key] = self._compare(then)
        return self._known[key]

    def _compare(self, then: Mapping[str, Any]) -> Found:
        was = then.get("data_fingerprint")
        if was is None:
            return Found(unknown="its row does not say which data it is of")
        if self._missing is not None:
            return Found(unknown=f"its data are not at hand ({self._missing})")
        if self._problem is not None:
            return self._changed(then, self._problem)
        if self._folder is not None:
            now = data_fingerprint(self._manifest)
            if now != was:
                return self._changed(then, f"its data_fingerprint was {was} and is {now} now")
            return Found(self._shard and f"was trained on other data: {self._shard}")
        unprepared = f"its data are not prepared in {self._data_dir}"
        folder = then.get("data_folder")
        alike = None if folder is None else _hash_in(folder) == _hash_in(self._name)
        if not self._inputs.files:  # the configuration alone decides, or nobody knows the files
            if alike is False:
                return self._changed(then, f"{self._source.where()} was prepared as {folder} and is {self._name} now")
            return Found(unknown=unprepared if self._inputs.files is None else None)
        inputs = then.get("data_inputs")
        limited = getattr(self._source, "limited", False)  # then files may have been left out, which have no hash
        if alike and (inputs is None or limited or self._inputs.n_bytes > MOST_HASHED):
            return Found()
        if inputs is not None:
            same_sizes = self._sizes_are(inputs)
            if same_sizes and limited:
                return Found(unknown=f"{unprepared}, and a limit left out files, of which only size and time are known")
            return Found() if same_sizes and self._summary == inputs else self._changed(then, self._in_all(inputs))
        if self._prepared_then(was) is not None:
            same = f"if they are the same, `prepare` with the same keys, and this is compared again ({self._name})"
            return self._changed(then, f"its files have other sizes or times than when they were prepared; {same}")
        return Found(unknown=f"{unprepared}, and a run of an earlier version recorded no sizes of files")

    def _sizes_are(self, inputs: Mapping[str, Any]) -> bool:
        """Whether number, size and settings of the files of now are as in a summary."""
        now = (len(self._inputs.files or []), self._inputs.n_bytes, self._inputs.settings)
        return now == tuple(map(inputs.get, ("files", "bytes", "settings")))

    @functools.cached_property
    def _summary(self) -> dict[str, Any]:
        return self._inputs.summary(files_of.hashes(self._inputs.files or []))

    def _in_all(self, inputs: Mapping[str, Any]) -> str:
        now, was = (len(self._inputs.files or []), self._inputs.n_bytes), (inputs.get("files"), inputs.get("bytes"))
        if now == was:
            return f"{self._source.where()}: {was[0]} files of {was[1]} bytes in all have other bytes now"
        return f"{self._source.where()}: {now[0]} files of {now[1]} bytes now, {was[0]} of {was[1]} bytes then"

    def _changed(self, then: Mapping[str, Any], otherwise: str) -> Found:
        """The answer that the data have changed, by names of files if the corpus of then is still there."""
        folder = self._prepared_then(then["data_fingerprint"])
        names = folder and files_of.differences(folder, read_manifest(folder), self._inputs)
        what = _few(names) if names else otherwise
        return Found(f"was trained on other data: {what}")

    def _prepared_then(self, fingerprint: str) -> Path | None:
        """The prepared folder with this fingerprint, if it is still there."""
        for folder in prepared_folders(self._data_dir):
            try:
                if data_fingerprint(read_manifest(folder)) == fingerprint:
                    return folder
            except (UserError, LookupError, TypeError):
                continue
        return None


def _hash_in(name: str) -> str:
    """The last part of the name of a prepared folder, which is a hash of what decides its tokens."""
    return name.rpartition("-")[2]


def _few(texts: Sequence[str]) -> str:
    others = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" (and {others} more)" if others > 0 else "")
