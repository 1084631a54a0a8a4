"""How a sweep declares its judgement: in its file, in sweep.json, and in the verdicts."""

import json
import math
import re
from dataclasses import replace

import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.curves import lr_sensitivity
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import ConfigError
from scaling_testbed.papers.declaration import NOT_DECLARED, Declaration, compared, of_study, parsed, recorded
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, NO_DIFFERENCE, Verdict
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.paper import PAPERS, Claim, Experiment, Paper, judged, not_judged, records_of
from scaling_testbed.papers.small_scale_proxies import PAPER
from scaling_testbed.sweeps.grid import SWEEP_DIR, load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan, remember, sweep_folder
from tests.analysis.conftest import LRS, MARGINS, grid, make_row
from tests.papers import worlds

OF_THE_BASE = [path for path in sorted(SWEEP_DIR.glob("*.yaml")) if "base: small_scale_proxies" in path.read_text()]
CLAIMS = [{"claim": "A.", "judged": "a"}, {"claim": "B.", "judged": "b"}, {"claim": "C.", "judged": "c"}]
WHOLE = """
base: small_scale_proxies
experiment: qknorm_lr
declared: {margins: {S: 0.1}}
axes: {model.qk_norm: [layernorm, none]}
scales:
  cpu: {declared: {critical_excess: 0.5, seed_sd: {loss: 1}}}
"""


def test_the_layers_of_a_sweep_file_declare_key_by_key(tmp_path):
    (tmp_path / "own.yaml").write_text(WHOLE)
    found = load_sweep(str(tmp_path / "own.yaml"), "cpu").declared
    base = load_sweep("qknorm_lr", "cpu").declared
    assert found.margins == {**base.margins, "S": 0.1} and found.seed_sd == {**base.seed_sd, "loss": 1.0}
    assert (found.critical_excess, found.lr_range) == (0.5, (1e-3, 1.0))
    assert load_sweep("qknorm_lr").declared.lr_range == (3e-4, 3e-1)


@pytest.mark.parametrize("scale", ["paper", "gpu_hour", "cpu"])
@pytest.mark.parametrize("path", OF_THE_BASE, ids=lambda path: path.stem)
def test_a_shipped_sweep_of_the_first_paper_declares_the_ends_of_its_rates(path, scale):
    sweep = load_sweep(path.stem, scale)
    assert {"S", "loss", "critical_lr", "recorded"} <= set(sweep.declared.margins)
    rates = sorted(map(float, sweep.axes.get("optimizer.lr", [])))
    if sweep.analysis == "lr_sensitivity" and len(rates) > 4:
        assert {rates[0], rates[-1]} & set(sweep.declared.lr_range) and set(sweep.declared.lr_range) <= set(rates)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "declared must be a mapping of lr_range, critical_excess, margins, seed_sd"),
        ("{range: [1, 2]}", "declared has no key range; it has lr_range"),
        ("{lr_range: 3}", r"declared.lr_range must be \[LOW, HIGH\]; got '3'"),
        ("{lr_range: [1, 0.1]}", r"declared.lr_range must be \[LOW, HIGH\] with LOW < HIGH"),
        ("{lr_range: [a, b]}", "declared.lr_range must be a number greater than zero; got 'a'"),
        ("{critical_excess: 0}", "declared.critical_excess must be a number greater than zero; got '0'"),
        ("{margins: 3}", "declared.margins must be a mapping of measures to numbers"),
        ("{margins: {s: 3}}", "declared.margins has no measure s; it has S, loss"),
        ("{margins: {S: nan}}", "declared.margins.S must be a number greater than zero"),
        ("{margins: {critical_lr: 0.9}}", "declared.margins.critical_lr is a factor; it must be above 1"),
        ("{seed_sd: {S: -1}}", "declared.seed_sd.S must be a number greater than zero"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_and_names_its_key(tmp_path, text, says):
    (tmp_path / "own.yaml").write_text(f"axes: {{optimizer.lr: [1e-3]}}\ndeclared: {text}\n")
    with pytest.raises(ConfigError, match=f"own.yaml: {says}"):
        load_sweep(str(tmp_path / "own.yaml"))


def test_a_margin_is_a_difference_or_the_logarithm_of_a_factor():
    found = parsed({"margins": {"S": 0.05, "critical_lr": 1.25}})
    assert found.margin("S") == 0.05 and found.margin("critical_lr") == math.log(1.25) and found.margin("loss") is None


def test_what_is_recorded_is_read_again():
    one = Declaration(
        lr_range=(1e-3, 1.0), margins={"S": 0.1}, seeds=[1], rates=[0.1], date="2026-01-02", commit="a" * 40
    )
    for own in (one, replace(one, claims=[]), replace(one, claims=CLAIMS)):
        assert recorded(json.loads(json.dumps(own.record()))) == replace(own, lr_range=(1e-3, 1.0))
    assert "claims" not in one.record() and "claims" not in str(replace(one, claims=CLAIMS))


def planned(tmp_path, *typed, text="declared: {margins: {loss: 0.02}}"):
    (tmp_path / "own.yaml").write_text(f"{text}\naxes: {{optimizer.lr: [1e-3, 1e-2]}}\nseeds: [4, 5]\n")
    sweep = narrowed(load_sweep(str(tmp_path / "own.yaml")), ["data=noise", f"runs_dir={tmp_path}/runs", *typed])
    runs, _ = plan(sweep)
    remember(runs, sweep)
    return sweep_folder(runs)


def declared_in(folder):
    return json.loads((folder / "sweep.json").read_text()).get("declared")


def test_the_plan_keeps_the_declaration_with_seeds_rates_date_and_commit(tmp_path):
    found = declared_in(planned(tmp_path))
    assert found["seeds"] == [4, 5] and found["rates"] == [1e-3, 1e-2] and found["margins"] == {"loss": 0.02}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and not found["changed"] and found["results"] == 0
    assert found["commit"] is None or re.match(r"[0-9a-f]{40}", found["commit"])


def test_a_declaration_that_stays_keeps_its_date_and_a_changed_one_tells_how_many_runs_had_a_result(tmp_path):
    folder = planned(tmp_path)
    about = json.loads((folder / "sweep.json").read_text())
    about["declared"]["date"] = "2020-01-01"
    (folder / "sweep.json").write_text(json.dumps(about))
    planned(tmp_path)
    assert declared_in(folder)["date"] == "2020-01-01"
    (folder / "abc").mkdir()
    (folder / "abc" / "result.json").write_text("{}")
    planned(tmp_path, text="declared: {margins: {loss: 0.03}}")
    found = declared_in(folder)
    assert found["margins"] == {"loss": 0.03} and found["changed"] and found["results"] == 1
    said = str(recorded(found))
    assert "margins: loss 0.03 nats; seeds 4, 5; rates 0.001, 0.01; changed 20" in said
    assert ", when 1 runs had a result. Before that: S" in said
    planned(tmp_path, text="declared: {margins: {loss: 0.04}}")  # what was declared first stays
    said = str(recorded(declared_in(folder)))
    assert (
        "margins: loss 0.02 nats; seeds 4, 5; rates 0.001, 0.01; declared 2020-01-01" in said
        and "loss 0.03" not in said
    )


def test_a_spread_over_seeds_is_no_part_of_how_results_are_judged(tmp_path):
    """It is for plans. One that is declared later, as it was measured, does not count as a change."""
    folder = planned(tmp_path)
    (folder / "abc").mkdir()
    (folder / "abc" / "result.json").write_text("{}")
    before = declared_in(folder)
    planned(tmp_path, text="declared: {margins: {loss: 0.02}, seed_sd: {loss: 0.01}}")
    assert declared_in(folder) == before and not before["changed"]
    one = Declaration(margins={"loss": 0.02})
    assert one.judges_as(replace(one, seed_sd={"loss": 1.0}))
    assert not one.judges_as(replace(one, margins={"loss": 0.03})) and not one.judges_as(replace(one, rates=[0.1]))


def test_a_declaration_says_that_its_commit_had_uncommitted_changes():
    one = Declaration(date="2026-01-02", commit=f"{'a' * 40} with uncommitted changes")
    assert str(one).endswith(f"at commit {'a' * 12} with uncommitted changes, before any run had a result")


def test_a_declaration_is_told_in_words():
    said = str(parsed({"margins": {"S": 0.05, "critical_lr": 1.25, "recorded": 1.1, "share": 0.1}}))
    assert "margins: S 0.05 nats, critical rate a factor of 1.25, diagnostic a factor of 1.1, share 0.1;" in said


def test_another_experiment_after_the_first_result_changes_what_was_declared(tmp_path):
    """Also where an earlier version named the experiment beside the declaration only."""
    declares = "paper: small_scale_proxies\nexperiment: {}\ndeclared: {{margins: {{loss: 0.02}}}}"
    folder = planned(tmp_path, text=declares.format("kappa"))
    assert declared_in(folder)["experiment"] == "small_scale_proxies/kappa"
    about = json.loads((folder / "sweep.json").read_text())
    del about["declared"]["experiment"]
    (folder / "sweep.json").write_text(json.dumps(about))
    (folder / "abc").mkdir()
    (folder / "abc" / "result.json").write_text("{}")
    planned(tmp_path, text=declares.format("kappa"))
    assert not declared_in(folder)["changed"]
    planned(tmp_path, text=declares.format("adam_eps"))
    found = declared_in(folder)
    assert found["changed"] and found["experiment"] == "small_scale_proxies/adam_eps"
    assert "Before that: the claims of small_scale_proxies/kappa; S over" in str(recorded(found))


def test_further_seeds_change_a_declaration(tmp_path):
    folder = planned(tmp_path)
    (folder / "abc").mkdir()
    (folder / "abc" / "result.json").write_text("{}")
    planned(tmp_path, "seed=4,5,6")
    assert declared_in(folder)["seeds"] == [4, 5, 6] and declared_in(folder)["changed"]


def test_runs_of_another_sweep_in_the_folder_change_no_declaration(tmp_path):
    folder = planned(tmp_path)
    before = declared_in(folder)
    (tmp_path / "other.yaml").write_text("axes: {optimizer.lr: [0.5]}\nseeds: [9]\n")
    typed = ["data=noise", f"runs_dir={tmp_path}/runs", "name=own"]
    other = narrowed(load_sweep(str(tmp_path / "other.yaml")), typed)
    runs, _ = plan(other)
    remember(runs, other)
    assert sweep_folder(runs) == folder and declared_in(folder) == before
    planned(tmp_path)
    planned(tmp_path, "seed=4", "optimizer.lr=1e-3")
    assert declared_in(folder) == before


def test_a_sweep_that_declares_nothing_keeps_what_was_declared(tmp_path):
    folder = planned(tmp_path)
    before = declared_in(folder)
    planned(tmp_path, text="")
    assert declared_in(folder) == before


def test_a_study_has_the_declared_range_everywhere(study, capsys):
    rows = grid(lambda c, w, lr, s: 3.0 + lr, [{}], widths=[32], lrs=(1e-3, 1e-2, 1e-1))
    found = study(rows, declared={"lr_range": [1e-3, 1e-1]})
    assert of_study(found)[0].lr_range == Evidence(found).lr_range == (1e-3, 1e-1)
    assert analyze.main(["lr_sensitivity", str(found.path)]) == 0
    said = capsys.readouterr().out
    assert "Learning rates in [0.001, 0.1] that enter S: 3" in said and "withheld" not in said
    assert analyze.main(["lr_sensitivity", str(found.path), "--lr-range", "1e-3,1e-2"]) == 0
    assert "in [0.001, 0.01] that enter S: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"lr_range": "x"}, "declared.lr_range must be [LOW, HIGH]; got 'x'"),
        ({"rates": ["x"]}, "declared.rates must hold numbers; got 'x'"),
        ({"seeds": [None]}, "declared.seeds must hold numbers; got None"),
        ({"experiment": 3}, "declared.experiment must be a str; got 3"),
        ({"claims": {}}, "declared.claims must be a list; got {}"),
        ({"claims": ["x"]}, "declared.claims must hold mappings with the texts claim and judged; got 'x'"),
        ({"claims": [{"claim": "x", "judged": 3}]}, "declared.claims must hold mappings with the texts claim and"),
    ],
)
def test_a_damaged_declaration_is_one_line_that_names_the_file(study, capsys, declared, says):
    place = study(grid(lambda *_: 3.0, [{}]), declared=declared).path
    assert analyze.main(["report", str(place)]) == 2
    assert f"sweep.json of {place}: {says}" in capsys.readouterr().err
    assert load(place).declared == declared


def test_s_and_verdicts_are_withheld_where_rates_were_drawn(study):
    rows = [make_row(lr, 3.0 + abs(math.log10(lr) + 2), seed=seed) for lr in LRS for seed in (0, 1)]
    declared = {"margins": {"S": 0.05}}
    plain = study(rows, declared=declared)
    searched = replace(plain, drawn=("optimizer.lr",))
    (whole,), (withheld,) = (lr_sensitivity.analyse(one, []) for one in (plain, searched))
    assert whole.s is not None and whole.critical is not None
    assert withheld.s is None and withheld.critical is None and withheld.best_lr == whole.best_lr
    assert withheld.withheld.startswith("optimizer.lr was drawn, and S needs a grid of rates")
    assert Evidence(plain).undeclared("S") is None
    assert "drawn values of optimizer.lr" in Evidence(searched).undeclared("S")


@pytest.mark.parametrize("planned", [True, False])
def test_rows_outside_of_the_declared_grid_are_left_out_of_verdicts_and_counted(study, planned):
    """Rows of one condition only, at another rate and, with a plan, of another size: all would change the effect."""
    rows = worlds.seeded(*worlds.qknorm_lr(True))[0]
    widest = [row for row in rows if row["optimizer.lr"] == 0.3 and row["model.qk_norm"] == "none"]
    more = [row | {"run_id": f"{row['run_id']} more", "optimizer.lr": 0.25, "val_loss": 9.0} for row in widest]
    if planned:
        larger = {"model.d_model": 256, "n_params_non_embedding": 12 * 2 * 256**2, "val_loss": 3.0}
        more += [row | larger | {"run_id": f"{row['run_id']} larger"} for row in rows if row["model.d_model"] == 32]
    declared = {"margins": MARGINS, "lr_range": [3e-4, 3e-1], "seeds": [0, 1, 2, 3], "rates": list(LRS)}
    found, experiment = study(rows, declared=declared), PAPER.experiment("qknorm_lr")
    plan = found.path / "plan.jsonl"

    def told(rows):
        if planned:  # which also lists a part of a trunk, without a row
            plan.write_text("".join(json.dumps({"run_id": row["run_id"], "is_part": True}) + "\n" for row in whole))
        evidence = Evidence(study(rows, declared=declared), experiment.group)
        return [verdict for _, verdict in judged(experiment, evidence)]

    whole = [*rows, {"run_id": "a part"}]
    before, after = told(rows), told([*rows, *more])
    which = f"Left out: {len(more)} rows that the plan does not list" if planned else "Left out: 12 rows at rates that"
    assert [one.word for one in after] == [one.word for one in before] and AGREES in {one.word for one in before}
    assert [one.effect for one in after] == [one.effect for one in before]
    assert all(which in one.words for one in after) and not any("eft out: " in one.words for one in before)
    assert load(found.path).unplanned == ({row["run_id"] for row in more} if planned else set())


def test_verdicts_go_by_what_was_declared_before_the_first_result(study):
    """The effect is 0.05 nats: above the margin that was declared later, and below that of the first declaration."""
    rows = worlds.seeded(*worlds.qknorm_axis(True))[0]
    seeds, experiment = [0, 1, 2, 3], PAPER.experiment("qknorm_axis")

    def told(**declared):
        found = study(rows, name="qknorm_axis", declared={"lr_range": [3e-4, 3e-1], "seeds": seeds, **declared})
        ((_, verdict),) = judged(experiment, Evidence(found, experiment.group))
        return verdict.word, verdict.words

    strict = {"margins": {"loss": 0.1}, "lr_range": [3e-4, 3e-1], "seeds": seeds}
    after = {"margins": {"loss": 0.02}, "results": 12}
    remark = "hat was declared after 12 runs had a result is not used"
    assert told(margins={"loss": 0.02})[0] == AGREES
    word, words = told(**after, changed=True, first=strict)
    assert word == NO_DIFFERENCE and remark in words
    word, words = told(**after)
    assert word == CANNOT_TELL and words.startswith("It was declared when 12 runs had a result. The effect is +0.0")
    word, words = told(**after, changed=True, first={**strict, "results": 3})
    assert word == CANNOT_TELL and words.startswith("It was declared when 3 runs had a result. ") and remark in words
    word, words = told(**after, first={**strict, "margins": {"loss": 0.02}})  # sweep.json was written anew
    assert word == AGREES and remark not in words


def told(*pairs):
    return [{"claim": claim, "judged": judged} for claim, judged in pairs]


def otherwise(declared, now):
    return f"it is judged otherwise than was declared: declared {declared}, now {now}"


@pytest.mark.parametrize(
    ("declared", "now", "reasons", "gone"),
    [
        ("Aa Bb Cc", "Cc Aa Bb", [None, None, None], []),
        ("Aa Bb", "Aa Bx", [None, otherwise("b", "x")], []),
        ("Aa Bb", "Ab Ba", [otherwise("a", "b"), otherwise("b", "a")], []),
        ("Aa Bb", "Ab", [otherwise("a", "b")], ["B"]),
        ("Aa", "Aa Bb", [None, NOT_DECLARED], []),
        ("Aa Bb", "Bb", [None], ["A"]),
        ("Aa Bb", "Aa Xb", [None, None], []),
        ("Aa Bb", "Aa Xx", [None, NOT_DECLARED], ["B"]),
        ("Aa Bb", "Aa Bx Xb", [None, otherwise("b", "x"), NOT_DECLARED], []),
        ("Aa Ba", "Aa Xa", [None, NOT_DECLARED], ["B"]),  # which of the two was it?
        ("Aa", "Xa Ya", [NOT_DECLARED, NOT_DECLARED], ["A"]),
        ("Aa Ab", "Aa", [None], ["A"]),
        ("", "Aa", [NOT_DECLARED], []),
    ],
)
def test_claims_are_found_by_their_texts_and_then_by_how_they_alone_are_judged(declared, now, reasons, gone):
    assert compared(told(*declared.split()), told(*now.split())) == (reasons, gone)


@pytest.mark.parametrize(
    ("claims", "same"),
    [
        (None, True),
        (CLAIMS[::-1], True),
        ([{"claim": "X.", "judged": "a"}, *CLAIMS[1:]], True),
        (CLAIMS[:2], False),
        ([*CLAIMS, {"claim": "D.", "judged": "d"}], False),
        ([{"claim": "A.", "judged": "x"}, *CLAIMS[1:]], False),
    ],
)
def test_a_declaration_judges_otherwise_with_other_claims(claims, same):
    one, other = Declaration(claims=CLAIMS), Declaration(claims=claims)
    assert one.judges_as(other) == other.judges_as(one) == same
    assert not one.judges_as(replace(other, seeds=[3]))


def certain(word, p):
    def judge(evidence):
        return Verdict(word=word, words="The effect is 1", effect=1.0, p=p)

    return judge


def test_a_claim_has_a_verdict_only_as_it_was_declared(study):
    """The margin of the second is another one than was declared, and the third is new."""
    rows = worlds.seeded(*worlds.qknorm_axis(True))[0]
    own = PAPER.experiment("qknorm_axis")
    (claim,) = own.claims
    now = replace(
        own,
        claims=[
            claim,
            Claim("By a margin.", replace(claim.judge, margin=0.01)),
            Claim("New.", replace(claim.judge, margin=0.03)),
        ],
    )
    first, second, _ = records_of(now)
    second = {**second, "judged": second["judged"].replace("margin 0.01", "margin 0.02")}
    base = {"lr_range": [3e-4, 3e-1], "seeds": [0, 1, 2, 3], "margins": {"loss": 0.02}}

    def verdicts(**declared):
        evidence = Evidence(study(rows, name="qknorm_axis", declared={**base, **declared}), own.group)
        return [verdict for _, verdict in judged(now, evidence)], not_judged(now, evidence)

    before, gone = verdicts()
    assert [one.word for one in before] == [AGREES] * 3 and gone == []
    found, gone = verdicts(claims=[first, second, {"claim": "Lost.", "judged": "x"}])
    assert [one.word for one in found] == [AGREES, CANNOT_TELL, CANNOT_TELL] and gone == ["Lost."]
    assert [one.effect for one in found] == [one.effect for one in before]
    assert found[0].words == before[0].words and [one.p for one in found[1:]] == [None, None]
    was, now_is = (f"by model.qk_norm_axis; difference; margin {margin} nats" for margin in ("0.02", "0.01"))
    assert found[1].words.startswith("It is judged otherwise than was declared: declared best loss with axis ")
    assert f"{was}, now best loss" in found[1].words and f"{now_is}. The effect is +0.0" in found[1].words
    assert found[2].words.startswith("This claim was not declared before the runs. The effect is +0.0")
    later = {"results": 3, "changed": True, "first": {**base, "claims": [first]}}
    assert [one.word for one in verdicts(claims=records_of(now), **later)[0]] == [AGREES, CANNOT_TELL, CANNOT_TELL]


@pytest.mark.parametrize(
    ("declared", "word"), [("ABC", CANNOT_TELL), ("AB", AGREES), ("A", AGREES), ("BC", CANNOT_TELL)]
)
def test_declared_claims_alone_are_counted_by_holm(study, declared, word):
    """Judged are A, with p = 0.03, and B; a removed claim counts, and a new one does not."""
    experiment = Experiment(name="x", claims=[Claim("A", certain(AGREES, 0.03)), Claim("B", certain(AGREES, 1e-9))])
    claims = [*records_of(experiment), {"claim": "C", "judged": "c"}, {"claim": "D", "judged": "d"}]
    kept = [one for one in claims if one["claim"] in declared or (one["claim"] == "D" and declared == "ABC")]
    evidence = Evidence(study(grid(lambda *_: 3.0, [{}]), name="own", declared={"claims": kept}))
    (_, first), (_, second) = judged(experiment, evidence)
    assert first.word == word and second.word == (AGREES if "B" in declared else CANNOT_TELL)
    assert ("not among 4 claims (Holm: p 0.09)" in first.words) == (declared == "ABC")


@pytest.fixture
def mine():
    """Returns a function that registers the paper `mine` of a stranger, with these claims, as a plug-in does."""

    def register(*claims):
        experiment = Experiment(name="rates", claims=[Claim(text, judge) for text, judge in claims])
        paper = Paper(name="mine", authors="A 2026", title="On rates", arxiv="2601.00001", experiments=[experiment])
        PAPERS.add("mine", paper, module="stranger")

    yield register
    del PAPERS["mine"]


OF_MINE = "paper: mine\nexperiment: rates\ndeclared: {margins: {loss: 0.02}}"


def with_a_result(folder):
    (folder / "abc").mkdir()
    (folder / "abc" / "result.json").write_text("{}")


def test_the_plan_keeps_the_claims_and_a_change_of_them_after_the_first_result_is_one(tmp_path, mine):
    mine(("A.", certain(AGREES, 0.01)))
    folder = planned(tmp_path, text=OF_MINE)
    first = declared_in(folder)
    assert first["claims"] == [{"claim": "A.", "judged": "certain.judge(p=0.01, word=agrees)"}]
    mine(("A.", certain(AGREES, 0.02)))
    planned(tmp_path, text=OF_MINE)  # before the first result
    second = declared_in(folder)
    assert second["claims"][0]["judged"] == "certain.judge(p=0.02, word=agrees)" and second["first"] is None
    with_a_result(folder)
    mine(("In other words.", certain(AGREES, 0.02)))
    planned(tmp_path, text=OF_MINE)
    assert declared_in(folder) == second
    mine(("A.", certain(AGREES, 0.02)), ("B.", certain(AGREES, 0.03)))
    planned(tmp_path, text=OF_MINE)
    found = declared_in(folder)
    assert found["changed"] and found["first"] == second and len(found["claims"]) == 2


@pytest.mark.parametrize("text", ["declared: {}", "paper: small_scale_proxies\ndeclared: {}"])
def test_a_sweep_without_an_experiment_declares_no_claim(tmp_path, text):
    found = declared_in(planned(tmp_path, text=text))
    assert found["claims"] == [] and found["experiment"] is None


@pytest.mark.parametrize("results", [True, False])
def test_a_declaration_of_an_earlier_version_gets_claims_before_the_first_result_only(tmp_path, results):
    text = "paper: small_scale_proxies\nexperiment: kappa\ndeclared: {margins: {loss: 0.02}}"
    folder = planned(tmp_path, text=text)
    about = json.loads((folder / "sweep.json").read_text())
    claims = about["declared"].pop("claims")
    about["declared"]["date"] = "2020-01-01"
    (folder / "sweep.json").write_text(json.dumps(about))
    if results:
        with_a_result(folder)
    planned(tmp_path, text=text)
    found = declared_in(folder)
    assert len(claims) == 3 and not found["changed"]
    if results:
        assert found == about["declared"]
    else:
        assert found["claims"] == claims and found["date"] > "2020-01-01"


def test_a_report_names_a_declared_claim_that_is_not_judged(study, capsys):
    """Also where no claim is left. Beside another experiment than the declared one, nothing is compared."""
    place = study(worlds.seeded(*worlds.qknorm_axis(True))[0], name="qknorm_axis").path
    claims = [*records_of(PAPER.experiment("qknorm_axis")), {"claim": "QK is <lost>.", "judged": "x"}]

    def report(experiment, *typed, claims=claims):
        declared = {"lr_range": [3e-4, 3e-1], "margins": MARGINS, "claims": claims}
        about = {"sweep": "x", "paper": "small_scale_proxies", "experiment": experiment, "declared": declared}
        (place / "sweep.json").write_text(json.dumps(about))
        assert analyze.main(["report", str(place), *typed]) == 0
        pages = [page.read_text() for page in place.glob("*.html")]
        [page.unlink() for page in place.glob("*.html")]
        return capsys.readouterr().out, pages[0]

    said, page = report("qknorm_axis")
    assert said.startswith(AGREES) and "\ndeclared and not judged: QK is <lost>.\nwrote " in said
    assert "Declared and not judged: QK is &lt;lost&gt;." in page
    said, page = report("mitigations", claims=claims[1:])
    assert said.startswith("judged by: ") and "\ndeclared and not judged: QK is <lost>.\nwrote " in said
    assert "Declared and not judged: QK is &lt;lost&gt;." in page
    for said in report("kappa", "--experiment", "qknorm_axis") + report("qknorm_axis", claims=claims[:1]):
        assert "not judged" not in said and "This claim was not declared" not in said
    assert "cannot tell" in report("kappa", "--experiment", "qknorm_axis")[0]
