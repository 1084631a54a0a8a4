"""The small runs of tests/training."""

from tests.training.conftest import data_dir, tiny, trained, whole  # noqa: F401
