"""What is installed from a wheel is whole: plain files only, every module imports and every config composes."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CHECK = """
import importlib, pkgutil, sys
import scaling_testbed
from scaling_testbed.config.compose import CONFIG_DIR, compose, run_config_files
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
assert sys.prefix in scaling_testbed.__file__, scaling_testbed.__file__
for module in pkgutil.walk_packages(scaling_testbed.__path__, "scaling_testbed."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for op in ("attention", "cross_entropy", "qk_norm_rope"):
    importlib.import_module(f"scaling_testbed.kernels.{op}.reference")
for path in run_config_files():
    compose([f"{path.parent.name}={path.stem}"])
sweeps = sorted((CONFIG_DIR / "sweep").glob("*.yaml"))
for path in sweeps:
    plan(load_sweep(path.stem))
print(len(run_config_files()) + len(sweeps))
"""


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment_from_another_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kernels = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.py")]
    assert {f"scaling_testbed/{path}" for path in kernels} <= set(names)
    remote = (ROOT / "scaling_testbed" / "exporting" / "remote").glob("*.py")
    assert {f"scaling_testbed/exporting/remote/{path.name}" for path in remote} <= set(names)
    report = ROOT / "scaling_testbed" / "report"
    templates = {f"scaling_testbed/report/templates/{path.name}" for path in (report / "templates").glob("*.j2")}
    assert templates and {"scaling_testbed/report/page.css", *templates} <= set(names)
    assert not any(name.startswith(("kernels/", "configs/", "tests/")) for name in names)
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, str(wheel)], check=True)
    checked = subprocess.run([python, "-c", CHECK], cwd="/", check=True, capture_output=True, text=True)
    assert int(checked.stdout) == len(
        [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "launcher"]
    )
