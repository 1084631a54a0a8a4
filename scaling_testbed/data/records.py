"""Records as a data set of the library `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    """The rows, which have the same keys, as a data set in memory."""
    import datasets

    return datasets.Dataset.from_list(list(rows))
