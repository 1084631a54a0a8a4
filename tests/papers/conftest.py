"""The synthetic rows of tests/analysis."""

from tests.analysis.conftest import study  # noqa: F401
