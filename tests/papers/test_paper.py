"""A paper is data that a sweep names and a study is judged by; the committed studies keep their verdicts."""

import dataclasses
import json
import textwrap
from pathlib import Path

import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import ConfigError
from scaling_testbed.papers import paper as papers
from scaling_testbed.papers.effects import CANNOT_TELL
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.paper import NO_EXPERIMENT, PAPERS, chosen, experiment_of, paper_named
from scaling_testbed.sweeps.grid import SWEEP_DIR, load_sweep
from tests.analysis.conftest import grid

STUDIES = Path(__file__).resolve().parents[2] / "studies"


@pytest.mark.parametrize("name", PAPERS)
def test_every_experiment_names_sweeps_that_name_it_back(name):
    for one in paper_named(name).experiments:
        for sweep in map(load_sweep, one.sweeps):
            assert (sweep.paper, sweep.experiment) == (name, one.name)


def test_every_shipped_sweep_names_an_experiment():
    """But for one about decisions, which no claim of the papers is about."""
    sweeps = [load_sweep(path.stem) for path in SWEEP_DIR.glob("*.yaml")]
    assert [one.name for one in sweeps if not one.experiment] == ["decisions"]


def test_a_committed_study_names_its_experiment():
    for path in sorted(STUDIES.glob("**/sweep.json")):
        about = json.loads(path.read_text())
        if about["sweep"] != "decisions":
            assert about["sweep"] in paper_named(about["paper"]).experiment(about["experiment"]).sweeps


def example():
    """The code in the docstring of paper.py."""
    lines = papers.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    from "))
    last = next(i for i, line in enumerate(lines) if line.startswith("    PAPERS.add"))
    return textwrap.dedent("\n".join(lines[first : last + 1]))


@pytest.fixture
def stranger():
    assert len(example().splitlines()) <= 10
    exec(compile(example(), "stranger.py", "exec"), {"__name__": "stranger"})
    yield paper_named("mine")
    del PAPERS["mine"]


def residuals(better):
    conditions = [{"model__residual": name} for name in ("pre", "peri")]

    def loss(condition, width, lr, seed):
        return 3.0 + 0.01 * seed - (0.1 + 0.001 * seed) * (condition["model__residual"] == better)

    return grid(loss, conditions, seeds=(0, 1, 2))


@pytest.mark.parametrize(("better", "verdict"), [("peri", "agrees"), ("pre", "disagrees")])
def test_a_strangers_paper_judges_the_study_of_a_strangers_sweep(stranger, study, tmp_path, capsys, better, verdict):
    text = "paper: mine\nexperiment: residuals\naxes: {model.residual: [pre, peri]}\n"
    (tmp_path / "own.yaml").write_text(f"{text}declared: {{margins: {{loss: 0.02}}}}\n")
    sweep = load_sweep(str(tmp_path / "own.yaml"))
    place = study(residuals(better), name="own").path
    about = {"sweep": sweep.name, "paper": sweep.paper, "experiment": sweep.experiment}
    about["declared"] = sweep.declared.record()
    (place / "sweep.json").write_text(json.dumps(about))
    assert analyze.main(["report", str(place)]) == 0
    assert capsys.readouterr().out.startswith(f"{verdict:13}  Peri-norm has the lower best loss.")
    page = (place / "report.html").read_text()
    assert "Which is best?" in page and "Wortsman" not in page


def test_a_paper_that_is_not_loaded_is_one_line_that_lists_those_that_are(study, tmp_path, capsys):
    place = study(residuals("pre")).path
    (place / "sweep.json").write_text('{"sweep": "own", "paper": "mine", "experiment": "residuals"}')
    assert analyze.main(["report", str(place)]) == 2
    said = capsys.readouterr().err
    known = "small_scale_proxies, over_training, loss_trajectory, fixed_durations, resuming, sparse_pretraining, "
    known += "growing, implicit_bias, document_selection, distillation, gpicl, skill_it, unlearning, secret_sharer"
    assert f"paper must be one of {known}, or one of a loaded plug-in" in said
    assert said.count("\n") == 1
    assert f"sweep.json of {place}: " in said and "type --plugins MODULE_OR_FILE" in said
    (tmp_path / "own.yaml").write_text("paper: mine\naxes: {seed: [1]}\n")
    with pytest.raises(ConfigError, match=r"own.yaml: paper must be one of small_scale_proxies, .*got 'mine'"):
        load_sweep(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("experiment: qknorm_lr", "experiment: qknorm_lr also needs paper:"),
        ("paper: small_scale_proxies\nexperiment: qknrom", "experiment must be one of qknorm_lr, .*no 'qknrom'"),
        ("paper: over_training\nexperiment: qknorm_lr", "experiment must be one of overtraining, "),
    ],
)
def test_a_sweep_of_an_experiment_that_is_not_there_is_refused(tmp_path, text, says):
    (tmp_path / "own.yaml").write_text(f"{text}\naxes: {{seed: [1]}}\n")
    with pytest.raises(ConfigError, match=says):
        load_sweep(str(tmp_path / "own.yaml"))


def test_a_sweep_on_a_papers_base_has_its_settings_and_no_experiment(tmp_path, study):
    (tmp_path / "own.yaml").write_text("base: small_scale_proxies\naxes: {model.norm: [rmsnorm]}\n")
    sweep = load_sweep(str(tmp_path / "own.yaml"), "cpu")
    assert (sweep.paper, sweep.experiment) == ("small_scale_proxies", None)
    found = dataclasses.replace(study(residuals("pre")), paper=sweep.paper)
    assert experiment_of(found) == (paper_named("small_scale_proxies"), NO_EXPERIMENT)


def test_a_folder_of_an_earlier_version_is_told_by_its_sweep_and_no_folder_by_its_name(study):
    found = study(residuals("pre"), name="anything", sweep="nano_lr")
    assert experiment_of(found)[1].name == "qknorm_lr"
    (found.path / "sweep.json").unlink()
    place = found.path.rename(found.path.with_name("qknorm_lr_cpu"))
    assert load(place).name == "qknorm_lr_cpu" and experiment_of(load(place)) == (None, NO_EXPERIMENT)


@pytest.mark.parametrize(("key", "value"), [("sweep", 3), ("paper", ["over_training"]), ("experiment", {"a": 1})])
def test_a_sweep_json_that_holds_no_texts_is_one_line(study, capsys, key, value):
    place = study(residuals("pre")).path
    (place / "sweep.json").write_text(json.dumps({"sweep": "own", key: value}))
    assert analyze.main(["report", str(place)]) == 1
    assert f"sweep.json: {key} must be a text or null; got {json.dumps(value)}" in capsys.readouterr().err


def test_an_experiment_is_chosen_by_its_name_or_with_its_papers(study, tmp_path, capsys):
    assert chosen("qknorm_lr") == chosen("small_scale_proxies/qknorm_lr") == chosen("nano_lr")
    with pytest.raises(ConfigError, match=r"--experiment must be one of small_scale_proxies/qknorm_lr, .*; got 'kapa'"):
        chosen("kapa")
    place = study(residuals("pre"), sweep="own").path
    assert analyze.main(["report", str(place)]) == 0 and "names no experiment" in (place / "report.html").read_text()
    assert analyze.main(["report", str(place), "--experiment", "small_scale_proxies/kappa"]) == 0
    assert "Figure 10 of Wortsman et al. 2023, Small-scale proxies" in (place / "kappa.html").read_text()
    capsys.readouterr()
    assert analyze.main(["report", str(place), "--experiment", "kapa"]) == 2
    assert "got 'kapa'" in capsys.readouterr().err


def test_a_name_in_two_papers_is_to_be_typed_with_the_papers(stranger):
    twin = dataclasses.replace(stranger, name="twin")
    PAPERS.add("twin", twin)
    try:
        with pytest.raises(ConfigError, match="one of mine/residuals, twin/residuals; got 'residuals'"):
            chosen("residuals")
        assert chosen("twin/residuals")[0] is twin
    finally:
        del PAPERS["twin"]


def test_a_claim_without_what_it_needs_cannot_tell(study):
    found = study([{"run_id": "a", "n_params": 1e4, "loss": 3.0}])
    for name in PAPERS:
        for one in paper_named(name).experiments:
            assert {claim.verdict(Evidence(found, one.group)).word for claim in one.claims} <= {CANNOT_TELL}
