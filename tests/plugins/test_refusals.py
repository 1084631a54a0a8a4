"""What is not allowed, missing, changed or said twice is refused in one line, by every door."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from scaling_testbed import plugins, sweep
from scaling_testbed.config.compose import compose, compose_many, recorded_run
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps.grid import Sweep, load_sweep
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.status import read_state
from scaling_testbed.train import main as train_main
from scaling_testbed.training.run import run_folder_path
from scaling_testbed.training.run import train as train_run
from tests.plugins.conftest import COMMON


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A folder with a plug-in that registers nothing, and no plug-in loaded."""
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("open('it_ran', 'a').write('x')\n")
    (tmp_path / "confs" / "optimizer").mkdir(parents=True)
    (tmp_path / "confs" / "optimizer" / "slow.yaml").write_text(
        "defaults: [/schema/optimizer/adamw@_here_]\nlr: 1e-4\n"
    )


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(plugins, "_loaded", {})


def refused(call, capfd, status):
    """The one line on stderr of a door that was refused."""
    capfd.readouterr()
    assert call() == status
    (line,) = capfd.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plugins=gone.py"], "gone.py: there is no such .py file"),
        (["plugins=a.py,b.py"], "plugins takes a name or a list of names, plugins=[a,b], for all runs"),
        (["plugins=3"], "plugins takes a name"),
        (["configs=nowhere"], "configs=nowhere: there is no folder"),
        (
            ["configs=confs", "optimizer=fast"],
            "optimizer has no choice 'fast'; it has adam_atan2, adamw, bare, muon, of_plugin, sgd",
        ),
        (
            ["configs=confs", "optimizer=of_plugin"],
            "optimizer=of_plugin comes from a plug-in that is not loaded; type plugins=",
        ),
        (["configs=confs", "experiment=naming"], "plugins is set in a config file; type plugins=[...]"),
        (
            ["plugins=it's.py"],
            """cannot read the override "plugins=it's.py"; write key=value, and put a value with spaces""",
        ),
        (["configs=confs", "optimizer=bare"], "optimizer has no schema; its file must name one in its defaults list"),
        (["configs=confs", "optimizer=torn"], "torn.yaml cannot be read as YAML: mapping values are not allowed here"),
        (["configs=confs", "optimizer=typo"], "In 'optimizer/typo': there is no key optimizer.lrr; did you mean"),
        (["configs=doubles"], "doubles/optimizer/muon.yaml has the same name as"),
        (["configs=[confs,more]"], "more/optimizer/slow.yaml has the same name as"),
    ],
)
def test_what_is_typed_wrong_is_one_line(tmp_path, capfd, overrides, message):
    for name, text in {
        "confs/optimizer/of_plugin.yaml": "defaults: [/schema/optimizer/not_there@_here_]\n",
        "confs/experiment/naming.yaml": "# @package _global_\nplugins: [mine.py]\n",
        "confs/optimizer/bare.yaml": "lr: 1e-3\n",
        "confs/optimizer/torn.yaml": "lr: : 1e-3\n",
        "confs/optimizer/typo.yaml": "defaults: [/schema/optimizer/adamw@_here_]\nlrr: 1e-3\n",
        "doubles/optimizer/muon.yaml": "",
        "more/optimizer/slow.yaml": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    line = refused(lambda: train_main(["--dry-run", *overrides]), capfd, 2)
    assert message in line and not (tmp_path / "it_ran").exists()


def test_a_folder_of_configurations_is_searched_and_listed_and_paths_become_absolute(tmp_path, capfd):
    run = compose(["plugins=mine.py", "configs=confs", "optimizer=slow"])
    assert run.optimizer.lr == 1e-4
    assert (run.plugins, run.configs) == ([str(tmp_path / "mine.py")], [str(tmp_path / "confs")])
    assert run.overrides == [f"plugins=['{tmp_path}/mine.py']", f"configs=['{tmp_path}/confs']", "optimizer=slow"]
    assert compose(run.overrides) == run and (tmp_path / "it_ran").read_text() == "x"
    lists = [["configs=confs", "optimizer=slow", f"seed={seed}"] for seed in (0, 1)]
    assert [one.optimizer.lr for one in compose_many(lists)] == [1e-4, 1e-4]
    assert train_main(["--help", "configs=confs"]) == 0
    assert "optimizer=adam_atan2 | adamw | muon | sgd | slow" in capfd.readouterr().out
    assert train_main(["--cfg", "job", "plugins=mine.py", "configs=confs", "optimizer=slow"]) == 0
    printed = capfd.readouterr().out
    assert f"plugins:\n- {tmp_path}/mine.py\n" in printed and "lr: 0.0001" in printed


# ---- A sweep file


def grid(tmp_path, text):
    (tmp_path / "theirs").mkdir(exist_ok=True)
    (tmp_path / "theirs" / "grid.yaml").write_text(text + "\naxes: {optimizer.lr: [1e-3, 1e-2]}\n")
    return "sweep=theirs/grid.yaml"


def test_a_sweep_file_does_not_run_what_was_not_typed(tmp_path, capfd, monkeypatch):
    name = grid(tmp_path, "plugins: ../mine.py\nconfigs: [../confs]\noverrides: [optimizer=slow, data=markov]")
    line = refused(lambda: sweep.main(["plan", name]), capfd, 1)
    assert "theirs/grid.yaml names the plug-in" in line and f"type plugins={tmp_path}/mine.py" in line
    assert not (tmp_path / "it_ran").exists()
    assert sweep.main(["plan", name, "plugins=mine.py", "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)
    assert len(planned) == 2 and (tmp_path / "it_ran").exists()
    assert planned[0]["overrides"][:2] == [f"plugins=['{tmp_path}/mine.py']", f"configs=['{tmp_path}/confs']"]


@pytest.mark.parametrize(
    "text",
    [
        "overrides: [plugins=mine.py]",
        "overrides: ['++plugins=[mine.py]']",
        "overrides: ['hydra.searchpath=[pkg://theirs]']",
        "together: [{plugins: [mine.py]}]",
        "together: [{'plugins=mine.py,x': [a]}]",
        "together: [{configs: [confs]}]",
    ],
)
def test_a_sweep_file_cannot_slip_a_plugin_past_its_key(tmp_path, capfd, text):
    line = refused(lambda: sweep.main(["plan", grid(tmp_path, text), "overrides=1"][:2]), capfd, 2)
    said = "is no key that can be set" if "plugins=mine.py,x" in text else "no override in a file may set"
    assert said in line and not (tmp_path / "it_ran").exists()


def test_a_scale_and_a_base_add_their_plugins_and_folders(tmp_path):
    (tmp_path / "confs" / "sweep" / "base").mkdir(parents=True)
    (tmp_path / "confs" / "sweep" / "base" / "low.yaml").write_text(
        "plugins: [../../../mine.py]\noverrides: [data=markov]"
    )
    text = "base: low\nscales: {one: {}, two: {plugins: other.py}}\naxes: {optimizer.lr: [1, 2]}"
    (tmp_path / "confs" / "sweep" / "high.yaml").write_text(text)
    (tmp_path / "confs" / "sweep" / "other.py").write_text("")
    with pytest.raises(UserError, match="high.yaml names the plug-in .*mine.py"):
        load_sweep("high", configs=["confs"])
    typed = {"plugins": ["mine.py", "confs/sweep/other.py"], "configs": ["confs"]}
    assert load_sweep("high", "two", **typed).plugins == [str(tmp_path / name) for name in typed["plugins"]]
    with pytest.raises(ConfigError, match="there is no sweep 'middle'; it is one of .*high"):
        load_sweep("middle", configs=["confs"])


# ---- A run folder, and what was run with other code


def test_a_run_of_someone_else_runs_nothing_and_one_of_other_code_is_not_taken_for_the_same(tmp_path, monkeypatch):
    few = [*COMMON, "budget.steps=2", "data=noise", "data.n_tokens=4096", "data.n_validation_tokens=2048"]
    typed = ["plugins=mine.py", "configs=confs", "optimizer=slow", *few]
    run = compose(typed)
    row, folder = train_run(run, quiet=True), run_folder_path(run)
    assert row["plugins"] == plugins.hashes(["mine.py"])
    assert read_state(only(run)).state == "finished"

    forget(monkeypatch)
    with pytest.raises(UserError, match="config.yaml names the plug-in .*mine.py, which is not .*type --plugins "):
        recorded_run(folder)
    assert (tmp_path / "it_ran").read_text() == "x"
    shutil.copy("mine.py", "elsewhere.py")  # the same source may lie anywhere
    plugins.load_plugins(["elsewhere.py"])
    assert recorded_run(folder).plugins == [str(tmp_path / "elsewhere.py")]

    forget(monkeypatch)
    Path("mine.py").write_text("changed = True\n")
    run = compose(typed)
    message = "was made with other code: plug-in .*mine.py .* has changed"
    with pytest.raises(UserError, match=message):  # the finished row
        train_run(run, quiet=True)
    with pytest.raises(UserError, match=message):
        recorded_run(folder)
    state = read_state(only(run))
    assert state.state == "changed" and "mine.py" in state.error and "has changed" in state.error
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match=message):  # the checkpoint
        train_run(run, quiet=True)


def test_a_run_has_nothing_of_a_plug_in_that_another_run_of_the_process_named(monkeypatch):
    compose(["plugins=mine.py"])
    run = compose([*COMMON, "budget.steps=2", "data=noise", "data.n_tokens=4096", "data.n_validation_tokens=2048"])
    train_run(run, quiet=True)
    forget(monkeypatch)
    assert recorded_run(run_folder_path(run)).plugins == []


def only(run):
    """`run` as a sweep plans it."""
    sweep = Sweep(name="only", folder="only", overrides=run.overrides[2:], plugins=run.plugins, configs=run.configs)
    (planned,), _ = plan(sweep)
    return dataclasses.replace(planned, folder=str(run_folder_path(run)))


def test_a_part_whose_facts_count_other_parameters_than_it_has_is_not_trained(tmp_path, capfd):
    """Every number of the run would be of another model."""
    head = "from scaling_testbed.model.layers import RMSNorm\nfrom scaling_testbed.model.parts import NORMS, Norm\n"
    (tmp_path / "liar.py").write_text(head + "NORMS.add('liar', Norm(RMSNorm, gains=2), module=__name__)\n")
    typed = [*COMMON, "data=markov", "data.n_tokens=20000", "plugins=liar.py", "model.norm=liar"]
    assert train_main(typed) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "has 26,848 parameters, but the facts of its parts give 27,008; correct the facts" in line


@pytest.mark.parametrize(
    "options",
    [
        ["--multirun", "experiment=evil"],
        ["--multirun", "experiment=over_training,evil"],
        ["--multirun", "data=markov,noise", "data.n_tokens=20000", "experiment=evil"],
        ["--cfg", "job", "experiment=evil"],
    ],
)
def test_a_folder_of_configurations_runs_no_code_through_hydra(tmp_path, capfd, options):
    """Hydra calls what hydra.callbacks and its logging name; only plugins= may name code."""
    (tmp_path / "confs" / "experiment").mkdir()
    target = "{_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [it_ran]}}"
    (tmp_path / "confs" / "experiment" / "evil.yaml").write_text(
        f"# @package _global_\nhydra: {{callbacks: {{x: {target}}}}}\n"
    )
    line = refused(lambda: train_main(["configs=confs", *options]), capfd, 2)
    assert "a file in configs= sets hydra.callbacks, which names code" in line and not (tmp_path / "it_ran").exists()
    assert train_main(["configs=confs", "optimizer=slow", "hydra.job.name=x", "--cfg", "job"]) == 0
