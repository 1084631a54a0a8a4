"""What a stranger adds in a folder outside of the package takes part in every way of starting a run."""

import json

import numpy as np
import pytest

from tests.conftest import REAL_PYTHON
from tests.plugins.strangers import RECIPES, STRANGERS
from tests.sweeps.cluster import until
from tests.sweeps.conftest import cluster, cluster_config  # noqa: F401

PREPARE_WITH_WORKERS = """
import sys
from pathlib import Path
from scaling_testbed.config.compose import compose
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.train import main

if __name__ == "__main__":
    run = compose(sys.argv[1:])
    for workers in (1, 2):
        print(prepare(run.data, run.tokenizer, data_dir=Path(f"workers{workers}"), workers=workers, chunk_bytes=2000))
    sys.exit(main(sys.argv[1:]))
"""


MOST_LINES = {
    "my_frugal.py": 55,
    "my_lssa.py": 25,
    "my_comp_sum.py": 12,
    "my_dco.py": 19,
}  # of code; the others show one seam each, in at most ten


@pytest.mark.parametrize("file", [name for name in RECIPES if name.endswith(".py")])
def test_a_recipe_is_short(file):
    """Every line counts that is not blank and no import: decorators, comments and closing brackets too."""
    lines = [line.strip() for line in RECIPES[file].splitlines() if line.strip()]
    assert 0 < len([line for line in lines if not line.startswith(("import ", "from "))]) <= MOST_LINES.get(file, 10)


def rows(folder):
    return [(json.loads(path.read_text()), path.parent) for path in sorted(folder.glob("*/result.json"))]


@pytest.fixture(scope="module")
def trained(lab):
    """One run by the door of training, after its data were prepared by one and by two workers; (row, folder, said)."""
    (lab.folder / "start.py").write_text(PREPARE_WITH_WORKERS)
    status, out, err = lab.run("start.py", *lab.named, *lab.overrides, "name=alone")
    assert status == 0, err
    ((row, folder),) = rows(lab.folder / "runs" / "alone")
    return row, folder, out


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_a_run_is_made_of_what_a_stranger_registered(stranger, trained, lab):
    row, folder, _ = trained
    assert row["status"] == "finished" and stranger.proof(row, folder)
    ours = {str(path) for path in lab.folder.glob("my_*.py")}
    assert set(row["plugins"]) == ours and all(len(sha256) == 64 for sha256 in row["plugins"].values())
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert {plugin["name"]: plugin["sha256"] for plugin in start["plugins"]} == row["plugins"]


def test_worker_processes_prepare_the_same_bytes(trained, lab):
    one, two = (sorted((lab.folder / f"workers{n}").glob("*/*")) for n in (1, 2))
    assert len(one) > 5 and [p.name for p in one] == [p.name for p in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_a_sweep_with_two_workers_finds_its_grid_and_its_plugins(lab, trained):
    status, out, err = lab.run("-m", "scaling_testbed.sweep", "run", "sweep=my_sweep", *lab.named, "--workers", "2")
    assert status == 0, out + err
    found = rows(lab.folder / "runs" / "my_sweep")
    assert [row["status"] for row, _ in found] == ["finished"] * 6
    assert all(stranger.proof(row, folder) for row, folder in found for stranger in STRANGERS)
    same = next(row for row, _ in found if row["run_id"] == trained[0]["run_id"])
    assert same["val_loss"] == trained[0]["val_loss"]
    assert f"'{lab.folder}/my_schedule.py'" in same["overrides"][0]  # absolute, for whoever takes it up
    about = json.loads((lab.folder / "runs" / "my_sweep" / "sweep.json").read_text())
    assert (about["paper"], about["experiment"]) == ("mine", "stairs")
    report = ("-m", "scaling_testbed.analyze", "report", "runs/my_sweep", "--out", "page.html")
    status, out, err = lab.run(*report, "--plugins", "my_paper.py")
    assert status == 0 and "Steep stairs have the lower loss." in out, out + err
    page = (lab.folder / "page.html").read_text()
    assert "A 2026, On stairs (arXiv 2601.00001)" in page and "my_schedule.py " in page
    status, _, err = lab.run(*report)
    assert status == 2 and "paper must be one of" in err and "or one of a loaded plug-in; got 'mine'" in err


def test_two_ranks_train_it_together(lab, trained):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scaling_testbed.train")
    status, _, err = lab.run(*launch, *lab.named, *lab.overrides, "parallelism=ddp", "name=ranks")
    assert status == 0, err
    ((row, folder),) = rows(lab.folder / "runs" / "ranks")
    assert row["world_size"] == 2 and all(stranger.proof(row, folder) for stranger in STRANGERS)
    assert row["val_loss"] == pytest.approx(trained[0]["val_loss"], rel=1e-6)


@pytest.mark.slurm
def test_a_slurm_task_trains_it(lab, cluster):  # noqa: F811
    command = ("submit", "sweep=my_sweep", "launcher=my_cluster", "seed=0", *lab.named, "runs_dir=on_slurm")
    status, out, err = lab.run("-m", "scaling_testbed.sweep", *command)
    assert status == 0 and "2 tasks" in out, err
    until(lambda: len(rows(lab.folder / "on_slurm" / "my_sweep")) == 2, 180)
    found = rows(lab.folder / "on_slurm" / "my_sweep")
    assert all(stranger.proof(row, folder) for row, folder in found for stranger in STRANGERS)


def test_the_script_of_a_stranger_s_launcher_asks_for_what_its_file_says(lab):
    command = ("submit", "--dry-run", "sweep=my_sweep", "launcher=my_cluster", *lab.named, "runs_dir=dry")
    status, out, err = lab.run("-m", "scaling_testbed.sweep", *command)
    assert status == 0 and "#SBATCH --time=0:10:00\n" in out and "--gpus-per-node" not in out, err


def test_a_law_is_listed_fitted_drawn_predicts_and_allocates(lab):
    (lab.folder / "a_law.py").write_text(RECIPES["my_law.py"])
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e8, 1e10, 4)))
    lines = [f"{a},{b},{1.7 + 3e5 / a + 2e7 / b}" for a, b in zip(n, d, strict=True)]
    (lab.folder / "rows.csv").write_text("\n".join(["n_params,n_tokens,loss", *lines]) + "\n")
    fit = ["fit", "rows.csv", "--law", "saturating", "--out", "fit.json", "--bootstrap", "20"]
    verbs = [["law", "list"], fit, ["predict", "fit.json", "--n-params", "1e9", "--n-tokens", "1e11", "--json"],
             ["allocate", "fit.json", "--flops", "1e19"], ["report", "fit.json"]]  # fmt: skip
    code = (
        "from scaling_testbed.analyze import main\n"
        f"for verb in {verbs!r}:\n    assert main([*verb, '--plugins', 'a_law.py']) == 0, verb"
    )
    status, out, err = lab.run("-c", code)
    assert status == 0, err
    (predicted,) = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert "saturating: L = E + A/N + B/D" in out and predicted["predicted_loss"] == pytest.approx(1.7005, abs=1e-4)
    assert (lab.folder / "fit.html").exists()
    predict = ("-m", "scaling_testbed.analyze", "predict", "fit.json", "--n-params", "1e9")
    status, _, err = lab.run(*predict, python=REAL_PYTHON)
    assert status == 1 and "the law 'saturating' is unknown; name the plug-in that adds it: --plugins" in err


FROM_PYTHON = """
import sys
import scaling_testbed as st

run_dir, *overrides = sys.argv[1:]
assert len(st.plan("my_sweep", overrides)) == 6
named = overrides[0].removeprefix("plugins=[").removesuffix("]").split(",")
model, about = st.load_model(run_dir, plugins=named)
print(type(model.final_norm).__name__, about.run.schedule.name)
"""


def test_the_api_takes_plugins_where_the_command_line_does(lab, trained):
    (lab.folder / "ask.py").write_text(FROM_PYTHON)
    status, out, err = lab.run("ask.py", trained[1], *lab.named)
    assert status == 0, err
    assert out.split() == ["L1Norm", "staircase"]
    refused = f"import scaling_testbed as st; st.load_model({str(trained[1])!r})"
    status, _, err = lab.run("-c", refused)
    assert status == 1 and "which is not installed and not named on this command line" in err
