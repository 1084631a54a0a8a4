"""What the compiler makes of every kernel at every shipped tile, for three generations of GPUs, without one."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_resources import SHARED_LIMIT, cases

attention = pytest.importorskip("scaling_testbed.kernels.attention.triton")

ROOT = Path(__file__).resolve().parents[2]
SMS = (80, 90, 100)
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


# Each kernel once in bf16, in the case that needs the most registers and shared memory.
DEMANDING = ["d128 bf16 softcap window stats", "attention backward d128 bf16 softcap window"]
DEMANDING += ["d128 bf16 softcap window documents stats"]
DEMANDING += ["recompute d128 bf16 softcap", "chunked d768 bf16 softcap", "layernorm d128 bf16"]
DEMANDING += ["layernorm of 64 and 64 heads d128 bf16"]

COMPILE = """
import json, sys
from benchmarks.kernel_resources import jobs, measure
wanted, without = json.loads(sys.argv[1])
wanted = [job for sms, only in wanted for job in jobs(sms) if any(text in job.name for text in only)]
wanted = [job for job in wanted if without not in job.name]
print(*map(json.dumps, measure(wanted)), sep="\\n")
"""


def compiled(*wanted, without="no such case", **environment):
    """Rows of benchmarks.kernel_resources, from a process in which Triton compiles. wanted: of (sms, only)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, json.dumps([wanted, without])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=["demanding cases", pytest.param("all cases", marks=pytest.mark.slow)])
def rows(request):
    """The quick tests compile each kernel once, for an H100. The slow tests compile every tile with every combination
    of features, in bf16 and fp32, for all three generations of GPUs, which takes ten minutes."""
    if request.param == "demanding cases":
        return compiled(([90], DEMANDING), without="no gradient")
    return compiled((SMS, [""]))


def test_every_kernel_compiles_for_every_generation(rows):
    assert [row for row in rows if "error" in row] == []
    sms, kernels = {row["sm"] for row in rows}, {row["kernel"] for row in rows}
    assert sms in ({90}, set(SMS)) and len(kernels) >= 8
    assert [sm for sm in sms if {row["kernel"] for row in rows if row["sm"] == sm} != kernels] == []


def test_no_kernel_spills_registers(rows):
    assert [row for row in rows if row["stack"]] == []


def test_every_tile_of_attention_has_a_case():
    for (kernel, width), dtype in itertools.product(attention.TILES, ("bf16", "fp32")):
        way = "backward" if kernel in ("keys_values", "queries") else "forward"
        name = f"attention {way} d{width} {dtype} softcap window"
        for documents in ("", " documents"):
            assert name + documents + " stats" * (kernel == "statistics") in cases()


def test_every_block_fits_in_shared_memory(rows):
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["sm"]]] == []


def test_matrix_kernels_in_bf16_use_the_tensor_cores(rows):
    of_products = ("attention", "cross_entropy recompute")
    matrix = [row for row in rows if row["case"].startswith(of_products) and " bf16" in row["case"]]
    matrix = [row for row in matrix if row["kernel"] != "delta_kernel"]
    found = {row["kernel"] for row in matrix}
    assert found == {
        "head_forward_kernel",
        "forward_kernel",
        "keys_values_kernel",
        "queries_kernel",
        "head_weight_kernel",
    }
    assert [row for row in matrix if TENSOR_CORES[row["sm"]] + ":" not in row["matrix"]] == []


@pytest.mark.slow
def test_the_oldest_triton_makes_of_them_what_this_one_does(tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path / "old"),
        "triton==3.6.0",
    ]
    subprocess.run(pip, check=True)
    rows = compiled(([90], [""]), PYTHONPATH=str(tmp_path / "old"), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert [row for row in rows if "error" in row or row["shared"] > SHARED_LIMIT[90]] == []
    assert {row["triton"] for row in rows} == {"3.6.0"}
    # In fp32, which is for checking, the oldest compiler spills where attention has every feature at once.
    assert [row for row in rows if row["stack"] and " bf16" in row["case"]] == []
