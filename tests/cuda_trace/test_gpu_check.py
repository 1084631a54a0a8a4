"""scripts/gpu_check.sh on the stand-in, so that no mistake is found on a GPU first."""

import os
import shlex
import subprocess

import pytest

from tests.cuda_trace import stand_in

pytestmark = pytest.mark.slow


@pytest.fixture
def check(tracer, tmp_path):
    """A function that makes stages, and returns the summary and the log."""
    # A child of the script has the stand-in, and the script has not.
    python, out = tmp_path / "python", tmp_path / "out"
    prepared = stand_in.environment(tracer.folder)
    lines = [f"export {name}={shlex.quote(prepared[name])}" for name in ("LD_PRELOAD", "TRITON_LIBCUDA_PATH")]
    lines += [f'exec {shlex.quote(tracer.python)} -m tests.cuda_trace.rehearse "$@"']
    python.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    python.chmod(0o755)

    def run(*stages, **environment):
        here = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(stand_in.ROOT), "WHEELS": str(tmp_path)}
        here.pop("TRITON_INTERPRET", None)
        command = [stand_in.ROOT / "scripts/gpu_check.sh", out, *stages]
        subprocess.run(command, env=here | environment, capture_output=True, check=False)
        log = (out / "log.txt").read_text()
        summary = (out / "summary.txt").read_text()
        return {line.split()[0]: line for line in summary.splitlines() if line.endswith(" s")}, log, out

    return run


def test_stages_of_whole_runs(check):
    # Memory is not used again, so that what a run reads is zero and not what another tensor has left.
    found, log, out = check("versions", "nccl", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert list(found) == ["versions", "nccl"] and not any("failed" in line for line in found.values()), log
    assert "failed" not in log
    assert len(list(out.glob("machine-*.json"))) == len(list(out.glob("processes-*.json"))) == 1


def test_stages_of_kernels_and_steps(check):
    found, log, out = check("head", "sdpa", "steps")
    assert list(found) == ["head", "sdpa", "steps"] and not any("failed" in line for line in found.values()), log
    # The head compares its results with the definition, and here there are none.
    assert "Traceback" not in log and "proxy_2m, eager" in log and "proxy_2m, graph" in log
    assert len(list(out.glob("steps-*.json"))) == len(list(out.glob("sdpa-*.json"))) == 1
