"""A training step on a GPU, traced where there is none: how much it asks of the GPU, and that it never waits for it."""

import json

import pytest

from tests.cuda_trace.cases import AT_MOST, CASES, FIGURES

pytestmark = pytest.mark.slow

SMALL = ["data.vocab_size=512", "batch.sequences=4", "batch.sequence_length=256", "evaluation.tokens=1024"]
NARROW = ["model=nano_m", "model.d_model=128", "model.n_heads=2", *SMALL]  # d_head 64
WIDE = ["model=nano_m", "model.d_model=128", "model.n_heads=1", *SMALL]  # d_head 128
DETERMINISTIC = "compute.deterministic=true"
ATTENTION = {
    "d_head 64": (NARROW, "cudnn"),
    "d_head 128": (WIDE, "cudnn"),
    "d_head 64, deterministic": ([*NARROW, DETERMINISTIC], "flash"),
    "d_head 128, deterministic": ([*WIDE, DETERMINISTIC], "flash"),
}


GRAPHS = {f"{name}, captured": [*CASES[name], "compute.cuda_graph=true"] for name in ("proxy_2m", "10m")}


@pytest.fixture(scope="module")
def traced(tracer):
    """A function from the name of a case to what a step of it asks of the GPU."""
    found = tracer.trace(CASES | GRAPHS | {name: overrides for name, (overrides, _) in ATTENTION.items()})

    def of(name):
        assert "error" not in found[name], found[name]["error"]
        return found[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_no_more_of_the_gpu_than_recorded(traced, name):
    recorded = json.loads(FIGURES.read_text())[name]
    # Launches are exact. The allocator's caches differ a little from process to process.
    slack = {"launches": 1.0, "bytes_per_token": 1.001, "peak_bytes": 1.02}
    more = {
        key: (traced(name)[key], recorded[key]) for key in AT_MOST if traced(name)[key] > slack[key] * recorded[key]
    }
    assert not more, f"more than recorded: {more}; if that is meant, record it anew (tests/cuda_trace/cases.py)"
    assert traced(name)["loss_impl"] == "triton" and traced(name)["precision"] == "bf16"


@pytest.mark.parametrize("name", [*CASES, *GRAPHS])
def test_the_host_waits_only_for_values_of_an_earlier_step(traced, name):
    assert traced(name)["waits"] == {"processes/device.py: self._done.synchronize()": 1}  # HostCopy.read


@pytest.mark.parametrize("name", GRAPHS)
def test_a_captured_step_is_one_launch_and_what_its_inputs_need(traced, name):
    counts = traced(name)["counts"]
    assert counts["graphs"] == 1 and traced(name)["launches"] <= 6, counts


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_cudnn_s_by_default_and_flash_where_bits_are_promised(traced, name):
    """The backward pass of cuDNN's attention sums in any order. That of flash attention has a deterministic kernel."""
    _, backend = ATTENTION[name]
    called = traced(name)["attention"]
    assert len(called) == 2 and all(backend in operator for operator in called), called
