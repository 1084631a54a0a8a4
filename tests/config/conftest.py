"""Here Hydra composes all words together, as in use."""

import pytest


@pytest.fixture(autouse=True)
def as_in_use(hydra_composes_all_words):
    pass
