"""A stranger's folder: plug-ins and configurations outside of the package, and a run that is made of them."""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.plugins.strangers import RECIPES, STRANGERS

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = [
    *("model=nano_s", "batch.sequences=8", "batch.sequence_length=16", "budget.steps=4", "evaluation.tokens=1024"),
    *("logging.every_steps=1", "compute.threads=1", "compute.device=cpu"),
]


@dataclass
class Lab:
    """The folder, and what starts the doors in it. overrides: of a run that uses all that the stranger registers."""

    folder: Path
    python: str
    overrides: list[str] = field(default_factory=list)

    @property
    def named(self) -> list[str]:
        """plugins= and configs=, relative to the folder."""
        files = sorted(path.name for path in self.folder.glob("my_*.py"))
        return [f"plugins=[{','.join(files)}]", "configs=confs"]

    def run(self, *command, timeout=240, python=None):
        """A Python command in the folder; returns (status, stdout, stderr)."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [python or self.python, *map(str, command)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment,
            timeout=timeout,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def lab(tmp_path_factory, python):
    folder = tmp_path_factory.mktemp("lab")
    overrides = list(COMMON)
    for stranger in STRANGERS:
        (folder / f"my_{stranger.name}.py").write_text(stranger.code)
        for name, text in stranger.configs.items():
            path = folder / "confs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        overrides += stranger.overrides
    (folder / "my_paper.py").write_text(RECIPES["my_paper.py"])
    sweep = RECIPES["confs/sweep/my_sweep.yaml"].replace("overrides: []", f"overrides: [{', '.join(overrides)}]")
    (folder / "confs" / "sweep").mkdir(parents=True)
    (folder / "confs" / "sweep" / "my_sweep.yaml").write_text(sweep)
    (folder / "confs" / "launcher").mkdir()
    (folder / "confs" / "launcher" / "my_cluster.yaml").write_text("gpus_per_node: 0\ntime: 0:10:00\n")
    return Lab(folder, python, overrides)
