"""No damaged file gives a traceback, a hang or another number: it is read right, or one clear line refuses it."""

import contextlib
import io
import json
import os
import signal
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from scaling_testbed.errors import UserError
from scaling_testbed.report import page
from tests.faults.damage import apply, damage
from tests.faults.readers import READERS, Reader

QUICK, SLOW = 50, 10_000
COMPOSING = ("config.yaml of a run", "configuration in configs=")  # Hydra composes for 0.2 s: a fifth of the readings
HANGS_SECONDS = 20
LONGEST_MESSAGE = 1000
NAMES = [one.name for one in READERS]


class Hangs(BaseException):
    """A reading took longer than HANGS_SECONDS."""


class Trial:
    """One reader, its valid file, and how its readings ended. Every reading finds the surroundings as they were."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader, self.folder, self.ends = reader, folder, Counter()
        self.path = reader.make(folder)
        self.files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.valid = self.files[self.path]
        self.content = canonical(reader.read(self.path))
        if reader.plain is not None:
            assert self.content == canonical(reader.plain(self.valid)), (
                "the plain parser reads the valid file otherwise"
            )

    def read(self, steps: list) -> None:
        data = apply(self.valid, steps)
        self.restore()
        self.path.write_bytes(data)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), no_hang():
                content = canonical(self.reader.read(self.path))
        except UserError as error:
            check_message(str(error), self.path, self.reader.beside)
            self.ends["refused"] += 1
            return
        if content == self.content:
            self.ends["read right"] += 1
        else:
            assert self.reader.plain is not None, "a hash protects the file, and other content was read"
            assert content == canonical(self.reader.plain(data)), "another content than a plain parser reads"
            self.ends["read as it is now"] += 1

    def restore(self) -> None:
        """Only what `reader.kept` names is written again: most readings change nothing."""
        for path, data in self.files.items():
            if self.reader.kept == "all" or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        if self.reader.kept not in ("", "all"):
            (self.path.parent / self.reader.kept).unlink(missing_ok=True)


def canonical(value) -> str:
    """A text that is equal for equal values: 1 and 1.0 differ, nan and nan do not."""
    return json.dumps(value, sort_keys=True, default=repr)


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise Hangs

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANGS_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_message(message: str, path: Path, beside: str) -> None:
    """One line, or two with the second saying what to do; both can be printed, and the file or its folder is named."""
    lines = message.splitlines()
    assert 1 <= len(lines) <= 2 and all(line.isprintable() for line in lines) and len(message) <= LONGEST_MESSAGE
    names = (path.name, path.stem, path.parent.name)  # the last one for a group of keys, such as model
    assert any(name in message for name in filter(None, [*names, beside])), f"no file is named: {message}"


def fuzz(name: str, examples: int, folder: Path, monkeypatch) -> Counter:
    monkeypatch.setattr(page, "inline_svgs", lambda *_: [""])  # a page is read here, and not drawn
    reader = next(one for one in READERS if one.name == name)
    trial = Trial(reader, folder)

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # one or two kinds of damage are short enough
        suppress_health_check=list(HealthCheck),
    )
    @given(damage(reader.form))
    def readings(steps):
        trial.read(steps)

    readings()
    return trial.ends


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: some readings write files, and wait for the disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_right_or_refused_in_one_line(name, memory, monkeypatch, record_property):
    ends = fuzz(name, QUICK // 5 if name in COMPOSING else QUICK, memory, monkeypatch)
    record_property("seen", counts(ends))


@pytest.mark.slow
@pytest.mark.fault("C: damaged files", "A damaged file is read right, or refused in one line that names it.")
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_damaged_files_are_read_right_or_refused_in_one_line(name, memory, monkeypatch, record_property):
    ends = fuzz(name, SLOW // 5 if name in COMPOSING else SLOW, memory, monkeypatch)
    record_property("seen", counts(ends))


def counts(ends: Counter) -> str:
    return f"{ends.total():,} readings: " + ", ".join(f"{number:,} {end}" for end, number in sorted(ends.items()))
