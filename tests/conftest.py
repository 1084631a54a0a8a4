"""Where there is no GPU, Triton's interpreter runs the kernels. To be said before any of them is imported."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests.warm import WarmPython

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if KERNEL_DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_PYTHON = "SCALING_TESTBED_TESTS_PYTHON"


def pytest_configure(config):
    """Of several test processes, the one that starts the others has the warm parent for all of them."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        config.warm_folder = tempfile.TemporaryDirectory(prefix="warm-python-")
        config.warm_python = WarmPython(Path(config.warm_folder.name))
        os.environ[SHARED_PYTHON] = config.warm_python.path


def pytest_unconfigure(config):
    if hasattr(config, "warm_python"):
        config.warm_python.close()
        config.warm_folder.cleanup()


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The path of an interpreter that starts in 0.1 s and not in 3: see tests/warm. It takes -m, -c or a file."""
    if SHARED_PYTHON in os.environ:
        yield os.environ[SHARED_PYTHON]
        return
    warm = WarmPython(tmp_path_factory.mktemp("python"))
    yield warm.path
    warm.close()
