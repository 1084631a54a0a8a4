"""The claims about curvature at equal loss on planted tables where they are right, and where they are wrong."""

import math

import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.analysis.trajectories.equal_loss import TABLE
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.implicit_bias import CURVATURE
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.row_files import write_rows
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row

SEEDS, SIZES = (10, 11, 12), (16, 32, 48)
LOSSES = [3.0, 2.6, 2.3, 2.15, 2.0]


def planted(study, slope, last=lambda width, seed: 2.0, declared=True):
    """A study of runs whose trace is loss^-5 N^-slope(loss), with a little noise; `last` is the last loss of a run."""
    rows, table = [], []
    for width in SIZES:
        for seed in SEEDS:
            row = make_row(5e-3, 2.0, d_model=width, seed=seed, run_id=f"{width}-{seed}")
            rows.append(row)
            for step, loss in enumerate([*LOSSES[:-1], last(width, seed)], 1):
                trace = (
                    1e4
                    * loss**-5
                    * (row["n_params_non_embedding"] / 1e4) ** -slope(loss)
                    * (1 + 0.01 * (seed * width // 16 % 3))
                )
                table.append({"run": f"runs/c/{row['run_id']}", "step": step, "n_params": 1, "tokens": 4096,
                              "data_fingerprint": "f", "loss": loss, "fisher_trace": trace})  # fmt: skip
    about = {"margins": {"recorded": 1.25}, "seeds": list(SEEDS)} if declared else None
    found = study(rows, name="curvature", declared=about)
    write_rows(found.path / TABLE, table)
    return found


def verdicts(found):
    return [claim.verdict(Evidence(found, CURVATURE.group)) for claim in CURVATURE.claims]


def test_a_flatter_larger_model_agrees_and_a_sharper_one_disagrees(study):
    found = verdicts(planted(study, lambda loss: 0.3 if loss < 2.5 else -0.1))
    assert [one.word for one in found] == [AGREES] * 3
    assert found[0].effect == pytest.approx(0.3 * math.log(10), abs=0.03) and "margin 1.25" in found[0].words
    sharper = verdicts(planted(study, lambda loss: -0.3))
    assert [one.word for one in sharper] == [DISAGREES, DISAGREES, AGREES]
    flatter = verdicts(planted(study, lambda loss: 0.3))
    assert [one.word for one in flatter] == [AGREES, AGREES, DISAGREES]
    same = verdicts(planted(study, lambda loss: 0.0))
    assert [one.word for one in same] == ["no difference"] * 2 + [AGREES]


def test_a_level_that_a_size_does_not_reach_withholds_only_its_claim(study):
    short = planted(study, lambda loss: 0.3, last=lambda width, seed: 2.14 if (width, seed) == (16, 11) else 2.0)
    found = verdicts(short)
    assert [one.word for one in found] == [AGREES, CANNOT_TELL, DISAGREES]
    assert "run 16-11 at N=6.14k: its 5 checkpoints have losses from 3.000 to 2.140" in found[1].words


def test_runs_without_a_place_in_the_table_and_a_study_without_one_cannot_be_told(study):
    found = planted(study, lambda loss: 0.3)
    lines = (found.path / TABLE).read_text().splitlines()
    (found.path / TABLE).write_text("\n".join(line for line in lines if "48-12" not in line))
    assert {one.word for one in verdicts(found)} == {CANNOT_TELL}
    assert "run 48-12 at N=55.3k: 0 checkpoints, and it takes two" in verdicts(found)[0].words
    (found.path / TABLE).unlink()
    assert {one.word for one in verdicts(found)} == {CANNOT_TELL}
    assert "does not exist; `python -m scaling_testbed.analyze curvature" in verdicts(found)[0].words


def test_without_a_declaration_there_is_no_verdict(study):
    found = verdicts(planted(study, lambda loss: 0.3, declared=False))
    assert {one.word for one in found} == {CANNOT_TELL} and "Nothing was declared" in found[0].words


def test_the_report_draws_the_traces_and_judges_them(study, capsys):
    found = planted(study, lambda loss: 0.3 if loss < 2.5 else -0.1)
    sweep = found.path / "sweep.json"
    sweep.write_text(sweep.read_text().replace("{", '{"paper": "implicit_bias", "experiment": "curvature", ', 1))
    assert analyze.main(["report", str(found.path)]) == 0
    assert capsys.readouterr().out.count(AGREES + " ") == 3
    page = (found.path / "report.html").read_text()
    assert "Curvature along the runs" in page and "A run moves to the left" in page
    assert load(found.path).rows


@pytest.mark.parametrize("scale", ["paper", "gpu_hour", "cpu"])
def test_the_sweep_has_three_sizes_at_a_constant_rate_and_keeps_checkpoints(scale):
    runs, same = plan(load_sweep("curvature", scale))
    assert len(runs) == 9 and same == 0 and len({run.n_params for run in runs}) == 3
    for run in runs:
        assert run.config["schedule.name"] == "constant"
        kept = [step for step in run.config["checkpoint.keep_steps"] if step <= run.steps]
        assert len(kept) >= 9 and max(b / a for a, b in zip(kept, kept[1:], strict=False)) <= 1.8
