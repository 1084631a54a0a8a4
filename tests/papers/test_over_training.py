"""The second paper's claims: on its published runs, and on planted testbeds where it is right or wrong."""

import math
import re
from pathlib import Path

import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.study import Study
from scaling_testbed.papers import law_claims
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES, NO_DIFFERENCE
from scaling_testbed.papers.law_claims import less
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.over_training import SINGLE_TASKS, TESTBED
from scaling_testbed.papers.paper import experiment_of
from scaling_testbed.papers.predictions import Number
from tests.analysis.rows.test_published import TESTBED as PUBLISHED
from tests.analysis.rows.test_published import at_hand

FILED = Path(__file__).resolve().parents[2] / "studies" / "overtraining_published" / "verdicts.txt"
SIZES = (1e7, 8e7, 1.5e8, 4e8, 1.4e9, 6.9e9)
MULTIPLIERS = (5, 10, 20, 40, 80, 160, 320, 640)


def verdicts(study):
    evidence = Evidence(study)
    return {str(claim): told(claim, evidence) for claim in experiment_of(study)[1].claims}


def told(claim, evidence):
    """The word and the numbers of a verdict."""
    found = claim.verdict(evidence)
    return found.word, found.words


@at_hand
def test_the_published_runs_have_the_verdicts_that_were_filed(tmp_path, capsys):
    page = tmp_path / "page.html"
    options = ["--source", "mlfoundations-scaling", "--out", str(page)]
    assert analyze.main(["report", str(PUBLISHED), *options]) == 0
    said = capsys.readouterr().out
    assert said.replace(f"wrote {page}\n", "") == FILED.read_text()
    assert "Gadre et al. 2024, Language models scale reliably" in page.read_text() and "2403.08540" in page.read_text()


@at_hand
def test_the_published_numbers_stand_in_the_verdicts():
    """Section 4: 0.7 % twice, 0.05 % and 3.6 %; Tables 2 and 7; all but one claim agree."""
    said = verdicts(published.study("mlfoundations-scaling", PUBLISHED))
    words = " ".join(number for _, number in said.values())
    for number in (
        "0.71%",
        "0.73%",
        "0.05%",
        "3.64%",
        "10.64%",
        "15.79%",
        "0.42%",
        "5.21%",
        "25.73%",
        "81.96%",
        "16.55%",
    ):
        assert number in words
    assert [verdict for verdict, _ in said.values()].count(AGREES) == len(said) - 1 >= 8
    assert DISAGREES not in [verdict for verdict, _ in said.values()]


def planted(change=lambda row, size, m: None, datasets=("c4", "redpajama", "refinedweb")):
    """Rows that follow the paper's laws; `change` mends each, told by the rank of its size and its multiplier."""
    rows = []
    for data in datasets:
        for size, n in enumerate(SIZES):
            for m in (m for m in MULTIPLIERS if size < 4 or m == 20 or (size, m) == (4, 320)):
                row = {"run_id": f"{data} {n:g} {m}", "dataset": data, "n_params": n, "n_tokens": n * m}
                own = data == "c4"
                row["loss"] = law(n, m) * (1.1 if m == 5 else 1.0) - 0.02 * own
                error = 0.85 - 2 * math.exp(-0.75 * row["loss"]) + 0.01 * own
                row |= {"error_17": error + 4e-4 * ((size, m) == (0, 20)), "error_46": error}
                row |= {f"error/{name}": error + 0.1 * (size == 5) for name in SINGLE_TASKS}
                row |= {"loss_c4_german": law(n, m), "loss_paloma_100_languages": law(n, m) * (1 + 0.1 * (-1) ** size)}
                change(row, size, m)
                rows.append(row)
    return Study(name="planted", path=Path("."), rows=rows, paper="over_training", experiment="overtraining")


def law(n, m, eta=0.13):
    return 1.8 + (200 * m**eta + 300 * m**-eta) * (6 * n * n * m) ** -eta


def held(size, m):
    """Whether no law of the loss is fitted to it."""
    return (size > 3 or m != 20) and (size, m) != (0, 320)


def scale(column, factor, at):
    def change(row, size, m):
        row[column] *= factor if at(size, m) else 1.0

    return change


def bend(row, size, m):
    start = 6 * SIZES[0] ** 2 * 320  # a run that the law is fitted to stays
    power = 0.05 * math.log2(m / 20) * (m > 20)
    row["loss"] = 1.8 + (row["loss"] - 1.8) * (6 * row["n_params"] ** 2 * m / start) ** power


def steeper(row, size, m):
    row["loss"] = law(row["n_params"], m, 0.18) if row["dataset"] == "redpajama" else row["loss"]


def exact_tasks(row, size, m):
    row["error_17"] += 0.1 * (size == 5)
    row |= {f"error/{name}": row["error_46"] for name in SINGLE_TASKS}


def higher_loss_of_c4(row, size, m):
    row["loss"] *= 1.2 if row["dataset"] == "c4" else 1.0


def better_error_of_c4(row, size, m):
    row["error_17"] -= 0.02 * (row["dataset"] == "c4")


def german_is_hard(row, size, m):
    row["loss_c4_german"], row["loss_paloma_100_languages"] = row["loss_paloma_100_languages"], row["loss_c4_german"]


BREAKS = {
    "The loss of a 1.4B model": scale("loss", 1.02, lambda size, m: (size, m) == (4, 320)),
    "So is that of a 6.9B model": scale("loss", 1.02, lambda size, m: size == 5),
    "Errors are uniformly low": scale("loss", 1.05, held),
    "At each multiplier from 20 on": bend,
    "The exponent of the law": steeper,
    "At 5 tokens per parameter": scale("loss", 1.2, lambda size, m: held(size, m) and m > 20),
    "The average error over 17 tasks": scale("error_17", 0.7, lambda size, m: MULTIPLIERS.index(m) % 2),
    "It is predicted to 0.05%": scale("error_17", 1.002, lambda size, m: size == 5),
    "It is predicted to 3.6%": scale("error_17", 1.06, lambda size, m: (size, m) == (4, 320)),
    "So is the average over all 46": scale("error_46", 1.1, lambda size, m: size == 5),
    "Single tasks": exact_tasks,
    "Without the 1.4B run": scale("error_17", 1.05, lambda size, m: (size, m) == (4, 20)),
    "Models trained on C4": higher_loss_of_c4,
    "Their downstream error": better_error_of_c4,
    "Trained on English C4": german_is_hard,
}


def test_every_claim_agrees_in_a_testbed_that_follows_the_laws():
    assert {text: said for text, said in verdicts(planted()).items() if said[0] != AGREES} == {}
    assert len(BREAKS) == len(TESTBED.claims)


@pytest.mark.parametrize("beginning", BREAKS)
def test_a_claim_disagrees_where_it_is_broken(beginning):
    (claim,) = [claim for claim in TESTBED.claims if claim.text.startswith(beginning)]
    verdict, words = told(claim, Evidence(planted(BREAKS[beginning])))
    assert verdict == DISAGREES, words


def test_a_small_error_at_little_more_than_the_fitted_compute_cannot_tell():
    def near(row, size, m):
        row["n_params"] /= (1, 1, 1, 1, 3, 14)[size]  # 1.4B becomes 0.47B, and 6.9B 0.49B
        row["n_tokens"] = row["n_params"] * m
        row["loss"] = law(row["n_params"], m)

    study = planted(near, ["redpajama"])
    got, words = told(TESTBED.claims[1], Evidence(study))
    assert got == CANNOT_TELL and "(0.00%)" in words


@pytest.mark.parametrize(
    ("change", "text", "says"),
    [
        (lambda row, size, m: row.pop("error_17"), "0.05%", "no run on redpajama has error_17"),
        (lambda row, size, m: row.update(n_tokens=row["n_params"] * (21 if m == 20 else m)), "6.9B model at",
         "redpajama has no run of its size number 1 at 20 tokens per parameter"),
        (lambda row, size, m: row.update(n_params=SIZES[size % 4]), "6.9B model at",
         "no run of the largest size, beyond its 4 smallest sizes"),
        (lambda row, size, m: row.update(dataset="other"), "Table 6", "no second data set"),
    ],
)  # fmt: skip
def test_rows_that_lack_what_a_claim_needs_cannot_tell(change, text, says):
    said = verdicts(planted(change, ["redpajama"]))
    ((got, words),) = [found for claim, found in said.items() if text in claim]
    assert got == CANNOT_TELL and says in words


def test_what_no_law_saw_is_counted_and_runs_that_are_no_seeds_of_each_other_are_refused():
    study = planted(datasets=["redpajama"])
    study.rows.append({**study.rows[0], "run_id": "bad", "status": "diverged", "loss": None})
    study.missing.append({"run_id": "gone"})
    claim = TESTBED.claims[0]
    got, words = told(claim, Evidence(study))
    assert got == AGREES and words.endswith("; left out: 1 diverged, 1 without a result")
    study.rows[0]["optimizer.lr"] = 1e-3
    study.rows.append({**study.rows[0], "run_id": "other", "optimizer.lr": 1e-2})
    got, words = told(claim, Evidence(study))
    assert got == CANNOT_TELL and "differ in optimizer.lr; choose with --where" in words


def of_seeds(n_seeds, noise=1e-4, **declared):
    """The planted testbed of one data set, run with several seeds. Losses differ by a share of themselves."""
    rows = []
    for seed in range(n_seeds):
        for at, row in enumerate(planted(datasets=["redpajama"]).rows):
            factor = 1 + noise * math.sin(100 * seed + at)
            rows.append({**row, "run_id": f"{row['run_id']} {seed}", "seed": seed, "loss": row["loss"] * factor})
    declared = {"experiment": "over_training/overtraining", **declared} if declared else None
    about = {"paper": "over_training", "experiment": "overtraining", "declared": declared}
    return Study(name="planted", path=Path("."), rows=rows, **about)


def test_laws_of_several_seeds_are_fitted_apart_and_judged_over_the_seeds():
    claim = TESTBED.claims[0]
    got, words = told(claim, Evidence(of_seeds(3, margins={"loss": 0.02})))
    assert (
        got == AGREES
        and re.match(
            r"The number is 0\.00\d* \(95 % interval from -?0\.0\S+ to 0\.00\S+; 3 seeds; limit 0\.0075\)", words
        )
        and "limit 0.0075). Seed 0: redpajama N=1.4B M=320" in words
    )
    got, words = told(claim, Evidence(of_seeds(3, noise=0.02, margins={"loss": 0.02})))
    assert got == CANNOT_TELL and "; 3 seeds" in words


def test_a_law_of_one_seed_tells_its_effect_and_no_verdict():
    got, words = told(TESTBED.claims[0], Evidence(of_seeds(1, margins={"loss": 0.02})))
    assert got == CANNOT_TELL
    assert re.match(r"One seed, so there is no interval\. The number is 0\.00\S*; limit 0\.0075\. ", words)


def test_a_seed_that_was_not_run_everywhere_is_no_second_seed():
    study = of_seeds(2, margins={"loss": 0.02})
    study.rows.pop()
    words = told(TESTBED.claims[2], Evidence(study))[1]
    assert words.startswith("One seed, so there is no interval. The number is ")


def missing(study):
    study.missing.append({"label": "gone (missing)", "seed": 1})


def of_no_plan(study):
    study.rows.pop()  # of the last seed


def diverged(study):
    study.rows[0] |= {"status": "diverged", "loss": None}


def twice(key):
    """All runs with two values of a key, but for one run of the last seed."""

    def change(study):
        study.rows[:] = [
            row | {key: value, "run_id": f"{row['run_id']} {value}"} for value in (4, 8) for row in study.rows
        ]
        study.rows.pop()

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (missing, "gone (missing)"),
        (of_no_plan, "a run of seed 2 like run redpajama 6.9e+09 20 1"),
        (diverged, "run redpajama 1e+07 5 0 diverged"),
        (twice("optimizer.lr"), "a run of seed 2 like run redpajama 6.9e+09 20 1 8"),
        (twice("batch.sequences"), "a run of seed 2 like run redpajama 6.9e+09 20 1 8"),
    ],
)
def test_a_missing_or_diverged_run_keeps_a_claim_about_laws_from_being_told(change, says):
    study = of_seeds(3, margins={"loss": 0.02})
    change(study)
    got, words = told(TESTBED.claims[0], Evidence(study))
    assert got == CANNOT_TELL and words.startswith("Missing or withheld: ") and says in words, words


def test_a_run_that_diverged_beside_other_rates_is_no_gap():
    study = of_seeds(2, margins={"loss": 0.02})
    for row in study.rows:
        row["optimizer.lr"] = 0.01
    more = {"run_id": "bad", "optimizer.lr": 1.0, "status": "diverged", "loss": None}
    study.rows.extend([study.rows[0] | more, study.rows[-1] | more])
    assert law_claims._gaps(Evidence(study)) == []


def test_numbers_of_several_seeds_that_hardly_differ_are_said_to_be_within_the_margin():
    def numbers(column):
        return lambda evidence: [Number(evidence.study.rows[0][column], f"{column} {evidence.study.rows[0][column]}")]

    rows = [{"seed": seed, "n_params": 1e6, "a": 1.0, "b": 1.05 + 0.001 * seed} for seed in range(3)]
    study = Study(name="planted", path=Path("."), rows=rows, declared={"margins": {"loss": 0.02}})
    verdict = less(numbers("a"), numbers("b"))(Evidence(study))
    assert (
        verdict.word == NO_DIFFERENCE
        and "The other number over the number is a factor of 1.05 (95 %" in verdict.words
        and "margin 1.1" in verdict.words
    )


def test_a_seed_that_is_no_number_is_named(tmp_path, capsys):
    lines = [f"c4,{n},{20 * n},{n**-0.1},first" for n in (1000, 2000)]
    (tmp_path / "own.csv").write_text("\n".join(["dataset,n_params,n_tokens,loss,seed", *lines]))
    asked = ["report", str(tmp_path / "own.csv"), "--experiment", "over_training/overtraining"]
    assert analyze.main([*asked, "--out", str(tmp_path / "page.html")]) == 0
    assert "row 1 dataset=c4 seed=first N=1000: seed must be a whole number, got first" in capsys.readouterr().out


# The beginnings of the claims about means over tasks.
ABOUT_ERRORS = ("The average error", "It is predicted", "So is the average", "Single tasks", "Without the 1.4B run")
ABOUT_ERRORS += ("Their downstream error",)


def with_own_tasks(study, names=("bracket", "continuation", "identifier")):
    """The study with errors as this project's rows have them, in place of the published columns."""
    for row in study.rows:
        mean = row.pop("error_17")
        for column in ("error_46", "loss_c4_german", "loss_paloma_100_languages"):
            row.pop(column)
        single = [row.pop(f"error/{task}") for task in SINGLE_TASKS]
        row |= {"error": None, "task_error": mean}
        row |= {f"error/{name}": error for name, error in zip(names, single, strict=False)}
    return study


def test_claims_about_published_errors_are_asked_of_the_studys_own_tasks_and_say_so():
    asked, own = verdicts(planted()), verdicts(with_own_tasks(planted()))
    note = "; error is the mean over the study's own tasks bracket, continuation, identifier"
    for claim, (word, words) in own.items():
        if "German" in claim:
            assert word == CANNOT_TELL and words == "no run on c4 has loss_c4_german"
            continue
        assert (word, claim) == (asked[claim][0], claim)
        assert (note in words) == claim.startswith(ABOUT_ERRORS)
    single = next(words for claim, (_, words) in own.items() if claim.startswith("Single tasks"))
    assert "the study's own tasks bracket " in single and "arc_easy" not in single
    broken = with_own_tasks(planted(scale("error_17", 0.7, lambda size, m: MULTIPLIERS.index(m) % 2)))
    assert next(word for claim, (word, _) in verdicts(broken).items() if "17 tasks" in claim) == DISAGREES


def test_one_task_of_a_study_is_no_single_task_beside_its_mean():
    said = verdicts(with_own_tasks(planted(), names=["bracket"]))
    assert next(found for claim, found in said.items() if claim.startswith("Single tasks"))[0] == CANNOT_TELL


def test_a_number_is_told_beside_its_limit_and_not_as_a_distance_from_it():
    """0.30, 0.31 and 0.32 beside a limit of 0.5, below it and above it; a spread of 1.2 beside a factor of 1.25."""
    rows = [{"seed": seed, "n_params": 1e6, "a": 0.3 + 0.01 * seed} for seed in range(3)]
    study = Study(name="planted", path=Path("."), rows=rows, declared={"margins": {"loss": 0.02}})

    def numbers(*factors):
        return lambda evidence: [Number(factor * evidence.study.rows[0]["a"], "a") for factor in factors]

    for judge, word in (
        (law_claims.within(numbers(1), 0.5), AGREES),
        (law_claims.within(numbers(1), 0.5, beyond=True), DISAGREES),
    ):
        verdict = judge(Evidence(study))
        assert verdict.word == word
        assert verdict.said == "The number is 0.31 (95 % interval from 0.285 to 0.335; 3 seeds; limit 0.5)"
    spread = law_claims.same_over(numbers(1, 1.2))(Evidence(study))
    assert spread.said.startswith(
        "The largest number over the least is a factor of 1.2 (95 % interval from 1.2 to 1.2;"
    )
    assert spread.said.endswith("; limit 1.25)")
