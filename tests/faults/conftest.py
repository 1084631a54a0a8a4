"""Which faults the collected tests provoke, and the entry points. The scorecard itself is in scorecard.py."""

import importlib

import pytest

from tests.faults.scorecard import faults_of

COLLECTED = pytest.StashKey[dict]()


@pytest.hookimpl(tryfirst=True)  # before -m and -k leave tests out
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {item.path: set() for item in items}
    for item in items:
        config.stash[COLLECTED][item.path] |= {name for name, _ in faults_of(item)}


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """Returns a function that calls an entry point with these words in a folder below the temporary one. It returns the
    exit status, stdout and stderr. Nothing is started: a process of its own is for what a signal or a limit does."""

    def call(door, *words, cwd="."):
        monkeypatch.chdir(tmp_path / cwd)
        capsys.readouterr()
        status = importlib.import_module(f"scaling_testbed.{door}").main([*map(str, words)])
        return (status, *capsys.readouterr())

    return call
