"""Where there is no GPU, Triton's interpreter runs the kernels. To be said before any of them is imported."""

import copy
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from scaling_testbed.config import compose as composing
from scaling_testbed.registry import Registry
from tests.warm import WarmPython

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if KERNEL_DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A file waits 10 ms for the disk and a run 0.3 s. It matters where the power fails, which no test provokes. The calls
# themselves are still seen by the tests that count them or let them fail.
os.fsync = lambda opened: None
REAL_PYTHON = sys.executable
LONG_FIRST = ("kernels/test_compiled", "training/test_distributed", "training/test_run", "sweeps/test_local")
LONG_FIRST += ("training/test_known_answers", "test_identity", "sweeps/test_plan", "plugins/test_strangers")
LONG_FIRST += ("diagnostics/test_in_runs", "exporting/test_hugging_face", "evaluation/test_scoring")
LONG_FIRST += ("evaluation/test_inspection", "sweeps/test_proxies", "commands/test_laws", "test_examples")
LONG_FIRST += ("faults/test_records", "faults/test_endings", "data/preparing/test_preparation")
LONG_FIRST += ("faults/test_identity_of_data", "faults/test_matrix_runs", "faults/test_fuzz", "training/test_ahead")
LONG_FIRST += ("kernels/cross_entropy/test_chunked_and_triton", "kernels/qk_norm_rope/test_triton")
SHARED_PYTHON = "SCALING_TESTBED_TESTS_PYTHON"


def pytest_configure(config):
    """Of several test processes, the one that starts the others has the warm parent for all of them."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        config.option.loadscopereorder = False  # files start in the order of pytest_collection_modifyitems
        config.warm_folder = tempfile.TemporaryDirectory(prefix="warm-python-")
        config.warm_python = WarmPython(Path(config.warm_folder.name))
        os.environ[SHARED_PYTHON] = config.warm_python.path


def pytest_collection_modifyitems(items):
    """The files that take longest come first."""
    order = {f"tests/{name}.py": rank for rank, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


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


@pytest.fixture(scope="session", autouse=True)
def hydra_composes_the_same_words_once():
    """Composing takes Hydra 0.2 s. The same overrides give the same configuration while the same schemas are known,
    which is what compose_many relies on too. Words with a folder of configurations (configs=) are always composed."""
    real, composed = composing._compose_dict, {}

    def compose_dict(overrides, configs, config_name="train", *, with_hydra=False):
        if configs or with_hydra:
            return real(overrides, configs, config_name, with_hydra=with_hydra)
        key = (*overrides, config_name, composing._register_schema.cache_info().currsize)
        if key not in composed:
            composed[key] = real(overrides, configs, config_name)
        return copy.deepcopy(composed[key])

    composing._compose_dict = compose_dict
    yield
    composing._compose_dict = real


@pytest.fixture(scope="module", autouse=True)
def parts_from_outside_are_forgotten():
    """After the tests of a file, only the parts of the package are registered, as in a new process."""
    yield
    for module in [module for name, module in sys.modules.items() if name.startswith("scaling_testbed")]:
        for registry in [value for value in vars(module).values() if isinstance(value, Registry)]:
            for name, origin in list(registry._modules.items()):
                if not origin.startswith("scaling_testbed"):
                    registry.pop(name, None)
                    del registry._modules[name]
