"""Where there is no GPU, Triton's interpreter runs the kernels. To be said before any of them is imported."""

import copy
import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from scaling_testbed.config import compose as composing
from scaling_testbed.config.words import chooses, key_of, read
from scaling_testbed.errors import ConfigError
from scaling_testbed.registry import Registry
from tests.warm import WarmPython

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if KERNEL_DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Looking for garbage took a fifth of the time of importing the tests, which make none.
gc.disable()

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
LONG_FIRST += (
    "test_reference",
    "kernels/cross_entropy/test_chunked_and_triton",
    "kernels/qk_norm_rope/test_triton",
    "test_peers",
)
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


def pytest_collection_finish():
    """What is imported now stays, so no collection looks at it; and fewer of them come."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_unconfigure(config):
    gc.unfreeze()  # else Triton reports at the end that they leak
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
def hydra_composes_the_same_choices_once():
    """Composing takes Hydra 0.2 s, and the same words give the same configuration while the same schemas are known. The
    words that choose groups are composed once. The others are applied to a copy, by the function of Hydra that does it
    in `compose` too, as in compose_many. What that refuses is composed together, and so is all with a folder of
    configurations (configs=). Yields what composes all words together."""
    real, composed = composing._compose_dict, {}

    def together(overrides, configs, config_name="train", *, with_hydra=False):
        if configs or with_hydra:
            return real(overrides, configs, config_name, with_hydra=with_hydra)
        key = (*overrides, config_name, composing._register_schema.cache_info().currsize)
        if key not in composed:
            composed[key] = real(overrides, configs, config_name)
        return copy.deepcopy(composed[key])

    def choices_first(overrides, configs, config_name="train", *, with_hydra=False):
        if configs or with_hydra:
            return real(overrides, configs, config_name, with_hydra=with_hydra)
        chosen = tuple(word for word in overrides if key_of(word) in composing.OUTSIDE or chooses(word))
        values = [read(word) for word in overrides if word not in chosen]
        try:
            found = together(chosen, configs, config_name)
            ConfigLoaderImpl._apply_overrides_to_config(values, found)
            return found
        except (*composing.CANNOT_COMPOSE, ConfigError):
            return together(overrides, configs, config_name)

    composing._compose_dict = choices_first
    yield together
    composing._compose_dict = real


@pytest.fixture
def hydra_composes_all_words(hydra_composes_the_same_choices_once, monkeypatch):
    """For a test of the composition itself: all words are composed together, as in use."""
    monkeypatch.setattr(composing, "_compose_dict", hydra_composes_the_same_choices_once)


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
