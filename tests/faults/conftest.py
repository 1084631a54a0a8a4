"""Which faults the collected tests provoke. The scorecard itself is in scorecard.py."""

import pytest

from tests.faults.scorecard import faults_of

COLLECTED = pytest.StashKey[dict]()


@pytest.hookimpl(tryfirst=True)  # before -m and -k leave tests out
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {item.path: set() for item in items}
    for item in items:
        config.stash[COLLECTED][item.path] |= {name for name, _ in faults_of(item)}
