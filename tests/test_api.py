"""The public API: loaded lazily, plain functions over overrides, paths and rows, the same numbers as the commands."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

import scaling_testbed as st
from scaling_testbed import analyze, plugins
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.conftest import grid
from tests.sweeps.conftest import TINY
from tests.test_architecture import ROOT, modules_loaded_by

STUDIES = ROOT / "studies"
SMALL = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000", "model=nano_s", "budget.steps=2"]
FAST = {"starts": 6, "bootstrap": 20}


@pytest.fixture
def places(tmp_path):
    return [f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/data"]


def test_importing_the_package_loads_nothing_that_takes_time():
    loaded = modules_loaded_by("import scaling_testbed as st\nassert set(st.__all__) <= set(dir(st))")
    assert not loaded & {"torch", "hydra", "omegaconf", "pandas", "numpy", "typer", "rich", "yaml"}
    loaded = modules_loaded_by("import scaling_testbed as st\nassert all(callable(getattr(st, n)) for n in st.__all__)")
    assert "scaling_testbed.api" in loaded and not loaded & {"torch", "hydra", "pandas", "numpy", "typer"}


def test_every_name_is_documented_and_its_types_are_there():
    api = importlib.import_module("scaling_testbed.api")
    for name in st.__all__:
        function = getattr(st, name)
        assert function is getattr(api, name) and function.__doc__ and function.__annotations__.get("return"), name


@pytest.mark.parametrize("name", ["train", "report"])
def test_a_submodule_of_the_same_name_does_not_replace_a_function(name):
    """In either order; Python sets a submodule as an attribute of its package when it is imported."""
    code = f"""
import sys
import scaling_testbed.{name}
import scaling_testbed as st
from scaling_testbed import {name}
assert st.{name} is {name} is sys.modules["scaling_testbed.api"].{name}
importlib = __import__("importlib")
assert importlib.import_module("scaling_testbed.{name}") is sys.modules["scaling_testbed.{name}"] is not {name}
importlib.reload(sys.modules["scaling_testbed.{name}"])
assert st.{name} is {name}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_function_cannot_be_replaced_unseen():
    with pytest.raises(AttributeError, match="st.fit|scaling_testbed.fit"):
        st.fit = None


def test_a_run_is_trained_found_again_and_opened(places, tmp_path):
    importlib.import_module("scaling_testbed.train")
    row = st.train([*SMALL, *places, "checkpoint.at_end=true"])
    assert row["status"] == "finished" and row["steps"] == 2
    assert st.train(st.compose([*SMALL, *places, "checkpoint.at_end=true"])) == row
    (loaded,) = st.load_rows(tmp_path / "runs" / "default")
    assert loaded["run_id"] == row["run_id"]
    model, about = st.load_model(tmp_path / "runs" / "default" / row["run_id"])
    assert about.step == 2 and about.run.model.name == "nano_s" and not model.training
    with torch.no_grad():
        assert model(torch.zeros((1, 3), dtype=torch.long)).shape[:2] == (1, 3)
    with pytest.raises(UserError, match="there is no tokenizer"):
        about.tokenizer  # noqa: B018
    with pytest.raises(UserError, match="holds no step 1"):
        st.load_model(tmp_path / "runs" / "default" / row["run_id"], step=1)
    with pytest.raises(ConfigError, match=r"did you mean optimizer.lr\?"):
        st.train(["optimizer.lrr=1"])


def test_a_sweep_is_planned_run_and_read(places, tmp_path, python, monkeypatch):
    monkeypatch.setattr(sys, "executable", python)
    (tmp_path / "tiny.yaml").write_text(TINY)
    asked = str(tmp_path / "tiny.yaml"), ["model=bigram", *places]
    runs = st.plan(*asked)
    assert len(runs) == 2 and not (tmp_path / "runs").exists()
    rows = st.run_sweep(*asked, workers=2)
    assert {row["run_id"] for row in rows} == {run.run_id for run in runs}
    assert {row["status"] for row in rows} == {"finished"}
    frame = st.load_rows(tmp_path / "runs" / "tiny", ["optimizer.lr=1e-3"], frame=True)
    assert list(frame["optimizer.lr"]) == [1e-3]
    with pytest.warns(UserWarning, match="1 combinations are the same run"):
        st.plan(asked[0], [*asked[1], "optimizer.lr=1e-3", "compute.device=cpu,auto"])
    folder = Path(runs[0].folder).with_name(st.plan(asked[0], ["budget.steps=3", *asked[1]])[0].run_id)
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)  # damaged: the run refuses to start
    with pytest.raises(UserError, match=folder.name):
        st.run_sweep(asked[0], ["budget.steps=3", "optimizer.lr=1e-3", *asked[1]])
    with pytest.raises(ConfigError, match="there is no sweep 'nano_lrr'"):
        st.plan("nano_lrr")


def test_rows_that_are_left_out_are_counted(tmp_path):
    lines = [{"run_id": "a", "val_loss": 3.0}, {"run_id": "b", "status": "failed", "val_loss": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="1 runs have no result and are left out"):
        assert [row["run_id"] for row in st.load_rows(tmp_path / "rows.jsonl")] == ["a"]


def test_a_fit_is_the_commands_from_a_path_from_rows_and_from_a_frame(tmp_path, capsys):
    path, held = STUDIES / "overtraining_cpu", ["n_params>4e5"]
    typed = ["--law", "over_training", "--hold-out", held[0], "--starts", "6", "--bootstrap", "20", "--json"]
    assert analyze.main(["fit", str(path), *typed]) == 0
    printed = json.loads(capsys.readouterr().out)
    report = st.fit(path, "over_training", hold_out=held, **FAST)
    assert json.loads(json.dumps(report.record())) == printed and report.predictions
    rows = st.load_rows(path)
    for given in (rows, st.load_rows(path, frame=True)):
        other = st.fit(given, "over_training", hold_out=held, **FAST)
        assert other.fit == report.fit and other.predictions == report.predictions
        assert other.record()["rows"] == "rows at hand"
    kept = tmp_path / "fit.json"
    kept.write_text(json.dumps(report.record()))
    asked = {"n_params": 1e6, "n_tokens": 2e7}
    assert st.predict(report, **asked) == st.predict(report.fit, **asked) == st.predict(kept, **asked)
    assert st.predict(kept, n_params=1e6, tokens_per_param=20.0) == st.predict(kept, **asked)
    with pytest.raises(ConfigError, match="over_training needs n_params, n_tokens"):
        st.predict(report, n_params=1e6)
    (best, *smaller) = st.allocate(kept, flops=1e13)
    assert best["flops"] == pytest.approx(1e13) and all(one["times_compute"] >= 1 for one in smaller if one["n_tokens"])
    with pytest.raises(ConfigError, match="must be a number greater than zero"):
        st.allocate(report, flops=0)


def test_sensitivity_and_instability_are_the_commands(tmp_path, capsys):
    path = STUDIES / "qknorm_lr_cpu"
    files = ["--out", str(tmp_path / "s.json")]
    assert analyze.main(["lr_sensitivity", str(path), "--where", "seed=10", *files, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "s.json").read_text())
    found = st.lr_sensitivity(path, where=["seed=10"])
    assert json.loads(json.dumps([one.record() for one in found])) == printed["rows"]
    rows = grid(lambda c, w, lr, s: 3.0 + lr, [{}], diagnostics_at_step=lambda *at: {"q/0": float(at[1])})
    series = st.instability(rows, quantity="q/0", threshold=100.0, hold_out_largest=True)
    assert series.quantity.threshold == 100
    assert [one.measured for one in series.predictions] == pytest.approx([128.0] * 7)
    assert st.lr_sensitivity(rows)[0].s == pytest.approx(st.lr_sensitivity(pandas.DataFrame(rows))[0].s)
    for wrong, said in [({"size": "n"}, "--size must be one of"), ({"lr_range": (1, 0.1)}, "LOW,HIGH")]:
        with pytest.raises(ConfigError, match=said):
            st.lr_sensitivity(rows, **wrong)


def test_a_page_is_written_and_its_verdicts_returned(tmp_path):
    page = tmp_path / "deep" / "page.html"
    said = st.report(STUDIES / "qknorm_lr_cpu", page, figures=[tmp_path / "figure.svg"])
    assert (
        said[0].startswith("agrees") and "<svg" in page.read_text() and "<svg" in (tmp_path / "figure.svg").read_text()
    )


def test_one_text_is_one_override_condition_or_key_and_not_its_letters(places):
    assert st.compose("model=bigram").model.name == "bigram"
    assert len(st.plan("nano_lr", "model=nano_s")) == 8
    rows = grid(lambda *_: 3.0, [{"model.qk_norm": "none"}, {"model.qk_norm": "layernorm"}], widths=(32,))
    key = "model.qk_norm"
    assert st.load_rows(rows, f"{key}=none") == st.load_rows(rows, [f"{key}=none"]) != []
    assert st.lr_sensitivity(rows, group=key) == st.lr_sensitivity(rows, group=[key])
    fits = [st.fit(STUDIES / "overtraining_cpu", hold_out=held, **FAST) for held in ("n_params>4e5", ["n_params>4e5"])]
    assert fits[0].record() == fits[1].record()


def test_a_sweep_takes_plugins_and_folders_as_it_does_on_the_command_line(places, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_loaded", {})
    (tmp_path / "tiny.yaml").write_text(TINY)
    register = "NORMS.add('api', Norm(RMSNorm, gains=1), module=__name__)\n"
    imports = "from scaling_testbed.model.layers import RMSNorm\nfrom scaling_testbed.model.parts import NORMS, Norm\n"
    (tmp_path / "mine.py").write_text(imports + register)
    (tmp_path / "confs" / "model").mkdir(parents=True)
    (tmp_path / "confs" / "model" / "of_api.yaml").write_text("defaults: [nano_s, _self_]\nname: of_api\nnorm: api\n")
    outside = [f"plugins={tmp_path}/mine.py", f"configs={tmp_path}/confs"]
    (run, _) = st.plan(tmp_path / "tiny.yaml", [*outside, "model=of_api", *places])
    assert run.config["model.norm"] == "api" and f"plugins=['{tmp_path}/mine.py']" in run.overrides


@pytest.mark.parametrize("places_of_runs", [{"workers": 0}, {"workers": -1}, {"gpus": [0], "runs_per_gpu": 0}])
def test_a_sweep_without_a_place_for_a_run_is_refused_and_waits_for_none(places, places_of_runs, tmp_path):
    with pytest.raises(ConfigError, match="must be greater than zero"):
        st.run_sweep("nano_lr", places, **places_of_runs)
    with pytest.raises(ConfigError, match="processes must be greater than zero"):
        st.plan("nano_lr", places, processes=0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("given", [3, [1], None])
def test_what_is_no_row_is_said_in_one_line(given):
    with pytest.raises(UserError, match="rows must be a path, a DataFrame or one mapping per run; got"):
        st.load_rows(given)
    assert st.load_rows({"run_id": "a", "val_loss": 3.0})[0]["run_id"] == "a"


def test_a_wrong_device_ending_parameter_or_objective_is_a_wrong_value(tmp_path):
    with pytest.raises(ConfigError, match="device='cudaa' cannot be used here"):
        st.load_model(tmp_path, device="cudaa")
    for out in ({"out": tmp_path / "page.txt"}, {"figures": [tmp_path / "figure.txt"]}):
        with pytest.raises(ConfigError, match=r"\.txt: the file must end in \.(html|png or \.svg)"):
            st.report(STUDIES / "overtraining_cpu", **out)
    assert not list(tmp_path.iterdir())
    for wrong, said in (
        ({"fix": {"Q": 1.0}}, "has no parameter 'Q'"),
        ({"objective": "lqs"}, "--objective must be one"),
    ):
        with pytest.raises(ConfigError, match=said):
            st.fit(STUDIES / "overtraining_cpu", **wrong, **FAST)
