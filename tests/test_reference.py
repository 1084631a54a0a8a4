"""What is generated from declarations is up to date, and the declarations are complete."""

import json
import re
import runpy
from pathlib import Path

import pytest

from scaling_testbed.config.compose import compose
from scaling_testbed.config.explain import UNEXPLAINED, explain, help_on, sections, typed
from scaling_testbed.config.run import GROUPS, flatten
from scaling_testbed.config.search import choices
from scaling_testbed.diagnostics.names import DIAGNOSTICS
from scaling_testbed.errors import ConfigError
from scaling_testbed.papers.paper import PAPERS, paper_named
from scaling_testbed.report.sweep import verdict_lines
from scaling_testbed.runs.metrics import STEP_METRICS
from scaling_testbed.runs.row import ROW_FIELDS, Row

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "studies"
FILED = [path.parent.name for path in sorted(STUDIES.glob("*/verdicts.txt")) if (path.parent / "sweep.json").exists()]


@pytest.fixture(scope="module")
def run():
    return compose([])


@pytest.fixture(scope="module")
def reference():
    """scripts/reference.py, which judges every filed study once."""
    return runpy.run_path(str(ROOT / "scripts" / "reference.py"))


def test_generated_files_are_up_to_date(reference):
    old = [name for name, text in reference["pages"]().items() if (ROOT / name).read_text() != text]
    assert not old, "run scripts/reference.py"


@pytest.mark.parametrize("name", FILED)
def test_a_filed_study_has_the_verdicts_that_were_filed(name, reference):
    """To the byte, as `analyze report` prints them before the line that says what it wrote."""
    _, _, verdicts = reference["studies"]()[name]
    said = verdict_lines(verdicts)
    assert said and "".join(f"{line}\n" for line in said) == (STUDIES / name / "verdicts.txt").read_text()


def test_there_are_filed_studies():
    assert len(FILED) >= 25


def test_the_page_of_papers_has_each_experiment_once_with_its_studies_and_a_sweep_that_exists():
    lines = [line for line in (ROOT / "docs" / "papers.md").read_text().splitlines() if "sweep run sweep=" in line]
    experiments = [one for paper in map(paper_named, PAPERS) for one in paper.experiments]
    assert len(lines) == len(experiments) and {
        one.question in line for one, line in zip(experiments, lines, strict=True)
    } == {True}
    filed = {path.parent.name: json.loads(path.read_text())["sweep"] for path in ROOT.glob("studies/*/sweep.json")}
    for one, line in zip(experiments, lines, strict=True):
        linked = re.findall(r"\]\(\.\./studies/(\w+)/README.md\)", line)
        assert linked == sorted(name for name, sweep in filed.items() if sweep in one.sweeps)
        assert ("not run yet" in line) == (not linked)
        assert line.count("sweep=") == 1 and set(re.findall(r"sweep=(\w+)", line)) <= set(choices("sweep"))
        counts = re.findall(r"\b(?:agrees|disagrees|no difference|cannot tell) (\d+)", line)
        assert sum(map(int, counts)) == len(one.claims) * len(linked)


def test_every_key_is_explained_and_every_group_has_a_meaning():
    entries = [entry for section, kinds in sections().items() for entry in explain(section, kinds)]
    assert [entry.key for entry in entries if entry.help == UNEXPLAINED] == []
    assert [name for name in GROUPS if help_on([name]).startswith(f"{name}: \n")] == []


def test_explanations_name_every_key_of_a_composed_run_with_its_default(run):
    entries = {}
    for section, kinds in sections().items():
        for entry in explain(section, kinds):
            entries.setdefault(entry.key, []).append(entry)
    flat = {key: value for key, value in flatten(run).items() if key != "name" and not key.endswith(".name")}
    assert set(flat) - set(entries) == set()
    for key, value in flat.items():
        if key.split(".")[0] not in (*GROUPS, "overrides"):  # a file in configs/ may set another value there
            assert entries[key][0].default == typed(value)


def test_a_kind_that_only_sets_another_default_shares_the_explanation():
    (clipping,) = [entry for entry in explain("optimizer", GROUPS["optimizer"]) if entry.key.endswith("_clipping")]
    assert clipping.default == "false (true with stable_adamw)"
    assert clipping.kinds == ("adamw", "stable_adamw")


def test_help_explains_a_section_a_key_and_a_key_without_its_section():
    assert "optimizer.lr: number, default 0.01" in help_on(["optimizer"])
    assert "Choices: none, layernorm, rmsnorm." in help_on(["model.qk_norm"])
    assert help_on(["qk_norm"]) == help_on(["model.qk_norm"])
    with pytest.raises(ConfigError, match="no section or key optimiser; did you mean --help optimizer"):
        help_on(["optimiser"])


def test_the_row_has_each_field_once_and_nothing_that_is_added_hides_one(run):
    row = Row.of(run, status="finished").as_dict()
    assert tuple(row)[: len(ROW_FIELDS)] == ROW_FIELDS and row["model.d_model"] == run.model.d_model
    added = Row(added={"val_loss": 1.0, "mine": 2.0}).as_dict()
    assert added["val_loss"] is None and added["mine"] == 2.0


def test_no_metric_is_named_twice():
    names = [metric.name for metric in (*STEP_METRICS, *DIAGNOSTICS)]
    assert len(names) == len(set(names))
