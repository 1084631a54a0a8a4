"""Every command composes a word in the same way, or refuses it in one line; and no secret gets into a composition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scaling_testbed import sweep
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import GROUPS, PLANNED_RUN, run_id
from scaling_testbed.export import main as export_main
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.local import Driver
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.slurm import SlurmConfig, write_submissions
from scaling_testbed.train import main as train_main

NOISE = ["data=noise", "data.n_tokens=4096", "data.n_validation_tokens=2048", "batch.sequences=4"]
NOISE += ["batch.sequence_length=16", "evaluation.tokens=1024", "compute.threads=1", "compute.device=cpu"]
SECRET = "hf_notforanyone"
pytestmark = pytest.mark.usefixtures("hydra_composes_all_words")


@pytest.fixture
def grid(tmp_path, monkeypatch, python, capfd):
    """Returns a function from (verb, words, further lines of the sweep file) to (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.chdir(tmp_path)

    def call(verb, *words, lines="axes: {optimizer.lr: [1e-3, 1e-2]}"):
        overrides = json.dumps([*NOISE, "budget.steps=2", "checkpoint.at_end=false"])
        Path("grid.yaml").write_text(lines if "overrides:" in lines else f"{lines}\noverrides: {overrides}\n")
        capfd.readouterr()
        status = sweep.main([verb, "sweep=grid.yaml", *words])
        return (status, *capfd.readouterr())

    return call


def refused(status, err):
    """The message of a command that was refused with status 2 and one line."""
    assert (status, len(err.splitlines())) == (2, 1), err
    return err.removeprefix("error: ").strip()


def everything_under(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join([*map(str, folder.rglob("*")), *(path.read_bytes().decode(errors="replace") for path in files)])


@pytest.mark.fault("A2", "The plan, the worker and a task of Slurm compose the same run from the same words.")
def test_a_typed_word_replaces_the_axis_in_the_plan_and_in_the_worker(grid, record_property):
    typed = ["model=bigram", "++optimizer.lr=5e-3,7e-3", "++optimizer.beta2=0.9"]
    planned = json.loads(grid("plan", "--json", *typed)[1])
    status, out, err = grid("run", *typed)
    assert status == 0, err
    rows = [json.loads(path.read_text()) for path in Path("runs/grid").glob("*/result.json")]
    assert {row["run_id"] for row in rows} == {run["run_id"] for run in planned}
    assert sorted(row["optimizer.lr"] for row in rows) == [5e-3, 7e-3]
    assert {row["optimizer.beta2"] for row in rows} == {0.9}
    assert {run_id(compose(run["overrides"])) for run in planned} == {row["run_id"] for row in rows}
    record_property("seen", f"planned and trained {', '.join(sorted(row['run_id'] for row in rows))}")


@pytest.mark.fault("A2", "A run that a sweep has started is the planned one, or it is refused.")
def test_a_worker_refuses_another_run_than_the_planned_one(grid, monkeypatch, capfd, record_property):
    """As where a file of configs= is edited while runs wait."""
    started = []
    grid("plan")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, *, env, **_: started.append((command, env)))
        (one, *_), _ = plan(load_sweep("grid.yaml"))
        Driver([one], [{}])._start(one, {})
    ((_, _, _, *words), environment) = started[0]
    monkeypatch.setenv(PLANNED_RUN, environment[PLANNED_RUN])
    said = refused(train_main([*words, "seed=1"]), capfd.readouterr().err)
    assert f"the plan was made for run {one.run_id}, and its words mean run " in said
    assert not list(Path("runs/grid").glob("*/result.json"))
    record_property("seen", said)


@pytest.mark.fault("A10", "A seed among the overrides of a sweep file is the seed of its runs.")
def test_a_seed_in_the_overrides_of_a_sweep_file_is_the_seed(grid, record_property):
    def seeds(*words, lines):
        return sorted({run["varied"].get("seed") or dict(text.split("=", 1) for text in run["overrides"])["seed"]
                       for run in json.loads(grid("plan", "--json", *words, lines=lines)[1])})  # fmt: skip

    words = json.dumps([*NOISE, "budget.steps=2", "seed=7"])
    lines = f"overrides: {words}\naxes: {{optimizer.lr: [1e-3, 1e-2]}}"
    assert seeds(lines=lines) == ["7"]
    assert seeds("seed=8,9", lines=lines) == ["8", "9"] and seeds("++seed=5", lines=lines) == ["5"]
    for run in json.loads(grid("plan", "--json", lines=lines)[1]):
        assert compose(run["overrides"]).seed == 7 and run_id(compose(run["overrides"])) == run["run_id"]
    twice = refused(*grid("plan", lines=f"{lines}\nseeds: [0, 1]")[::2])
    assert "seed is given twice, by seed=7 and by seeds" in twice
    record_property("seen", "seed 7 in each run; beside seeds: refused")


PLACES = {
    "typed": ["name=${oc.env:HF_TOKEN}"],
    "typed in a list": ["checkpoint.keep_steps=[1,${oc.decode:${oc.env:HF_TOKEN}}]"],
    "nested": ["name=${model.${oc.env:HF_TOKEN}}"],
    "named by a reference": ["name=oc.env", "runs_dir=${${name}:HF_TOKEN}"],
    "escaped once": [r"name=\${oc.env:HF_TOKEN}"],
    "the choice of a group": ["model=${oc.env:HF_TOKEN}"],
    "a file of configs=": ["configs=confs", "experiment=theirs"],
    "a defaults list of configs=": ["configs=confs", "experiment=choice"],
    "options of Hydra": ["--cfg", "job", "--resolve", "name=${oc.env:HF_TOKEN}"],
    "configs= and options of Hydra": ["configs=confs", "--cfg", "job", "--resolve", "experiment=theirs"],
}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder of configurations by another person that asks for a secret of the environment."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "confs" / "experiment").mkdir(parents=True)
    (tmp_path / "confs" / "experiment" / "theirs.yaml").write_text("# @package _global_\nname: a${oc.env:HF_TOKEN}\n")
    (tmp_path / "confs" / "experiment" / "choice.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: ${oc.env:HF_TOKEN}\n"
    )
    return tmp_path


@pytest.mark.parametrize("words", PLACES.values(), ids=PLACES)
@pytest.mark.fault("A18", "What reads the environment is refused by name, wherever it is written.")
def test_no_word_and_no_configuration_reads_the_environment(theirs, capfd, words, record_property):
    status = train_main([*words, *NOISE, "budget.steps=1"])
    out, err = capfd.readouterr()
    message = refused(status, err)
    assert "oc.env" in message or "${" in message
    assert SECRET not in out + err + everything_under(theirs)
    record_property("seen", message)


@pytest.mark.fault("A18", "A sweep file and a run folder of another person do not read the environment.")
def test_no_sweep_file_and_no_run_folder_reads_the_environment(theirs, grid, capfd, record_property):
    for lines in (
        "axes: {name: ['${oc.env:HF_TOKEN}']}",
        "overrides: ['name=${oc.env:HF_TOKEN}']",
        "description: ${oc.env:HF_TOKEN}",
        "scales: {small: {axes: {model.name: ['${oc.env:HF_TOKEN}', a]}}}",
    ):
        assert "oc.env" in refused(*grid("plan", lines=lines)[::2])
    folder = theirs / "runs" / "a" / "123456789abc"
    folder.mkdir(parents=True)
    for words, data_dir in ((["name=${oc.env:HF_TOKEN}"], "data"), ([], "${oc.env:HF_TOKEN}")):
        record = {"data_dir": data_dir, "overrides": [*NOISE, *words]}
        (folder / "config.yaml").write_text(yaml.safe_dump(record))
        assert export_main([str(folder), str(theirs / "out")]) != 0
        out, err = capfd.readouterr()
        assert "oc.env" in err and len(err.splitlines()) == 1
        assert SECRET not in out + err + everything_under(theirs)
    record_property("seen", err.strip())


SAID = {
    "C: several values": (["optimizer.lr=1e-3,3e-3"], "`sweep run sweep=NAME`, or add --multirun; a list is"),
    "C: a comma at the end": (["optimizer.lr=1e-3,"], "a value is missing after the last comma"),
    "C: model=PATH": (["model=/path/my.yaml"], "Put the file into DIR/model/ and type configs=DIR model=my"),
    "C: seed of 20 digits": (["seed=99999999999999999999"], "seed must lie between -2^63 and 2^63"),
    "C: integer of 300 digits": (["model.d_model=1" + "0" * 299], "model.d_model must lie between -2^63 and 2^63"),
    "C: integer of 5000 digits": (["model.d_model=1" + "0" * 4999], "cannot read the override"),
    "C: lone surrogate in a name": (["name='a\udc80'"], "has a character that UTF-8 cannot write"),
    "C: NUL in a name": (["name='a\0'"], "has a NUL character"),
    "C: no key": (["=5"], "cannot read the override '=5'"),
    "C: unknown option": (["--nope"], "unrecognized arguments: --nope; it has -q, -v, --dry-run"),
    "C: --multirun and --cfg": (["--multirun", "seed=1,2", "--cfg", "job"], "--multirun and --cfg cannot be typed"),
    "C: --shell-completion": (["--shell-completion"], "`python -m scaling_testbed --show-completion`"),
    "C: --hydra-help and a word": (["--hydra-help", "model=bigram"], "--hydra-help takes no words; got model=bigram"),
    "C: --cfg foo": (["--cfg", "foo"], "invalid choice: 'foo'"),
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(*case, marks=pytest.mark.fault(name, "What a person mistypes is refused in one line."), id=name)
        for name, case in SAID.items()
    ],
)
def test_what_a_person_mistypes_is_refused_in_one_line(words, said, capfd, record_property, grid):
    message = refused(train_main(words), capfd.readouterr().err)
    assert said in message
    if not words[0].startswith("--") and "several" not in said and "--multirun" not in said:
        assert said in refused(*grid("plan", *words)[::2])  # the same words for a sweep
    record_property("seen", message)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.fault("C: ~group", "A group that is taken away is named in one line.")
def test_a_group_cannot_be_taken_away(group, capfd, record_property):
    message = refused(train_main([f"~{group}"]), capfd.readouterr().err)
    assert f"~{group}" in message
    record_property("seen", message)


@pytest.mark.fault("C: glob", "A function of Hydra's grammar works in a sweep, or is refused by name.")
def test_the_functions_of_hydras_grammar_work_in_a_sweep_or_are_refused_by_name(grid, record_property):
    def planned(word):
        status, out, err = grid("plan", "--json", word)
        return [run["varied"] for run in json.loads(out)] if status == 0 else refused(status, err)

    assert {run["model"] for run in planned("model=glob(nano_3*)")} == {"nano_32x1", "nano_32x3"}
    assert {run["seed"] for run in planned("seed=range(1,4)")} == {"1", "2", "3"}
    assert {run["optimizer.lr"] for run in planned("optimizer.lr=choice(1,2)")} == {"1", "2"}
    assert [run["optimizer.lr"] for run in planned("optimizer.lr=sort(3,1,2)")] == ["1", "2", "3"]
    for word in ("optimizer.lr=interval(0,1)", "optimizer.lr=shuffle(1,2)", "optimizer.lr=tag(a,choice(1,2))"):
        assert f"{word.split('=')[1].split('(')[0]}() is not for a run" in planned(word)
    assert "model=glob(x*) finds no choice; it has bigram" in planned("model=glob(x*)")
    assert "stands for no value, or for more than 10,000" in planned("seed=range(inf)")
    record_property("seen", "glob, range, choice, sort work; interval, shuffle, tag are refused by name")


@pytest.mark.fault("C: .inf", "A sweep file with values of a wrong kind is refused in one line that names it.")
def test_a_sweep_file_with_values_of_a_wrong_kind_is_refused_in_one_line(grid, record_property):
    for lines, said in (
        ("description: [.inf]", "description must be a text; got ['.inf']"),
        ("axes: {optimizer.lr: [.inf]}", "optimizer.lr: value '.inf'"),
        ("seeds: [.inf]", "seed"),
        ("seeds: []", "seeds must hold one number or more"),
        (f"axes: {{model.d_model: [1{'0' * 299}]}}", "model.d_model must lie between -2^63 and 2^63"),
        (f"axes: {{model.d_model: [1{'0' * 4999}]}}", "cannot read the override"),
        ('axes: {name: ["a\\ud800"]}', "grid.yaml"),
        ('axes: {name: ["a\\0"]}', "NUL"),
        ("axes: {'': [1]}", "grid.yaml"),
        ("axes: {name: [../../x]}", "name must be a plain folder name; got '../../x'"),
        ("axes: {optimizer.lr: [2001-99-99]}", "optimizer.lr: value '2001-99-99'"),
        ("axes: {optimizer.lr: &a [*a]}", "an alias that contains itself"),
        ("axes: {optimizer.lr: [!!binary aGk=]}", "a key cannot have the value b'hi'"),
        ("axes: {optimizer.lr: [!!python/object/apply:os.getcwd []]}", "cannot be read as YAML"),
        ("axes: {optimizer.lr: ['1e-3,3e-3']}", "write each as an item of the list"),
        ("axes: {'~optimizer.lr': [1]}", "is no key that can be set"),
        ("axes: {seed: [1, 2]}", "seed is given twice among axes, together, draw and seeds; write seeds: [0, 1]"),
        ("overrides: [optimizer.lr=1]\naxes: {optimizer.lr: [1, 2]}", "optimizer.lr is given twice"),
        ("overrides: ['optimizer={lr: 1}']\naxes: {optimizer.lr: [1, 2]}", "optimizer.lr is given twice"),
        ("exclude: [{}]", "exclude holds an entry without keys"),
    ):
        message = refused(*grid("plan", lines=lines)[::2])
        assert said in message, message
    record_property("seen", message)


@pytest.mark.fault("38", "YAML that asks for code is refused, and a name is never run by a shell.")
def test_tricks_of_yaml_and_of_names_run_nothing(theirs, grid, capfd, record_property):
    tag = "!!python/object/apply:pathlib.Path.touch [it_ran]"
    assert "cannot be read as YAML" in refused(*grid("plan", lines=f"axes: {tag}")[::2])
    (theirs / "confs" / "experiment" / "choice.yaml").unlink()
    (theirs / "confs" / "experiment" / "theirs.yaml").write_text(f"# @package _global_\nname: {tag}\n")
    status = train_main(["configs=confs", "experiment=theirs"])
    assert "theirs.yaml cannot be read as YAML" in refused(status, capfd.readouterr().err)
    for name in ("../../x", "a/../../x", "/tmp/x", "..", ".", ".x", ""):
        assert "name must be a plain folder name" in refused(train_main([f"name='{name}'"]), capfd.readouterr().err)

    grid("plan")  # writes the file
    name = "a b; $(touch it_ran) `touch it_ran` \"'%j"
    words = [f"{key}={json.dumps(value)}" for key, value in {"name": name, "logging.project": name}.items()]
    loaded = load_sweep("grid.yaml")
    runs, _ = plan(type(loaded)(**{**vars(loaded), "overrides": [*loaded.overrides, *words]}))
    (submission,) = write_submissions(runs, SlurmConfig(python=name, account=name, constraint=name), 1001)
    (theirs / "srun").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    (theirs / "srun").chmod(0o755)
    environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1", "PATH": f"{theirs}:{os.environ['PATH']}"}
    subprocess.run(["bash", submission.folder / "job.sh"], env=environment, check=True)
    received = (Path(runs[0].folder) / "log.txt").read_text().splitlines()
    assert received[1] == name and all(word in received for word in runs[0].overrides)
    assert compose(received[4:]).name == name and run_id(compose(received[4:])) == runs[0].run_id
    assert not list(theirs.rglob("it_ran")) and SECRET not in everything_under(theirs)
    record_property("seen", f"received as one word: {received[1]}")
