import pytest

from tests.cuda_trace.cases import NotHere, Tracer


@pytest.fixture(scope="session")
def tracer(tmp_path_factory):
    """What traces runs on the stand-in for a GPU. Skips where there is no CUDA build of PyTorch."""
    try:
        return Tracer(tmp_path_factory.mktemp("stand_in"))
    except NotHere as reason:
        pytest.skip(str(reason))
