"""The page is whole, alone, and says what is missing."""

import json
import re
import shlex
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.curves import lr_sensitivity
from scaling_testbed.analysis.curves.grouping import curves
from scaling_testbed.analysis.figures.drawing import SCREEN, _draw, _look, _style, inline_svgs
from scaling_testbed.analysis.figures.panel import Line, Panel, compact, parts
from scaling_testbed.analysis.figures.panels import against_key, sensitivity_panels, trace_panels
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.report.sweep import write_report
from tests.analysis.conftest import MARGINS, grid, make_row
from tests.papers import worlds

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, ids and text, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.links, self.text = [], [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        found = [value for key, value in attrs if key in ("src", "href", "xlink:href") and value[0] != "#"]
        if tag == "a":
            self.links += found
        else:
            self.loads += found
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(study, tmp_path):
    """Returns a function from a sweep's name, rows and traces to its parsed report."""

    def make(name, rows, traces=None):
        write_report(study(rows, name=name, traces=traces), tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text())

    return make


@pytest.mark.parametrize("name", ["qknorm_lr", "predict_logits", "zloss_trace", "kappa", "width_depth_lr"])
def test_the_page_stands_alone(page, tmp_path, name):
    found = page(name, *getattr(worlds, name)(True))
    assert found.open == [] and found.loads == [] and "script" not in found.tags
    assert found.tags.count("svg") >= found.tags.count("figure") == found.tags.count("figcaption") >= 1
    assert len(found.ids) == len(set(found.ids))
    text = (tmp_path / "report.html").read_text()
    assert "width=device-width" in text and "@import" not in text
    assert text.count("<table") == text.count('<div class="box"><table')
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used and used <= set(found.ids)


def test_the_page_says_verdicts_numbers_and_what_is_missing(page):
    rows, _ = worlds.qknorm_lr(True)
    rows[3] = {**rows[3], "status": "failed"}
    text = page("qknorm_lr", rows).text
    assert "Cannot tell." in text and "Figure 1 of Wortsman" in text
    assert f"Without a result: run {rows[3]['run_id']} (failed)." in text
    assert "1 failed, 41 finished" in text


def test_what_differs_from_the_paper_is_listed(page):
    rows = [{**make_row(lr, 3.0), "steps_planned": 400, "batch.sequences": 256} for lr in (1e-3, 1e-2)]
    text = page("qknorm_lr", rows).text
    assert "budget.steps100000400" in text and "batch.sequences256" not in text


def test_text_from_rows_cannot_break_the_page(page):
    rows = [make_row(lr, 3.0, model__qk_norm=name) for lr in (1e-3, 1e-2) for name in ("<b>&", "none")]
    found = page("qknorm_lr", rows)
    assert "b" not in found.tags and "<b>&" in found.text


def test_the_command_prints_the_verdicts(study, tmp_path, capsys):
    study(worlds.seeded(*worlds.qknorm_axis(True))[0], name="qknorm_axis", declared={"margins": {"loss": 0.02}})
    assert analyze.main(["report", str(tmp_path / "qknorm_axis")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("agrees ") and (tmp_path / "qknorm_axis" / "report.html").exists()
    assert "\njudged by: S over rates from 0.0003 to 0.3; critical rate at 0.25 nats above the best; margins:" in said


def test_without_matplotlib_one_line_says_what_to_install(study, tmp_path, capsys, monkeypatch):
    study(worlds.qknorm_axis(True)[0], name="qknorm_axis")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyze.main(["lr_sensitivity", str(tmp_path / "qknorm_axis")]) == 1
    assert "pip install -e '.[analysis]'" in capsys.readouterr().err


def test_without_scipy_one_line_says_what_to_install(study, tmp_path, capsys, monkeypatch):
    study(worlds.predict_logits(True)[0], name="predict_logits")
    for name in ("scipy", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, None)
    assert analyze.main(["instability", str(tmp_path / "predict_logits"), "--hold-out-largest"]) == 1
    assert "pip install -e '.[analysis]'" in capsys.readouterr().err


def test_a_cross_is_drawn_for_a_diverged_run_and_names_keep_ids_apart():
    def svg(crosses, name="a"):
        line = Line(x=[1e-3, 1e-2], y=[3.0, 4.0], label="none", n_params=1e4, crosses=crosses)
        return inline_svgs(Panel(lines=[line], x_label="x", y_label="y"), name)[0]

    assert "diverged" in svg([False, True]) and "diverged" not in svg([False, False])
    assert svg([True, True]).count("<use ") == svg([False, True]).count("<use ") + 1
    plain = Panel(lines=[Line(x=[1.0, 2.0], y=[3.0, 4.0], label="told apart")], x_label="x", y_label="y")
    assert inline_svgs(plain, "c")[0].count(">told apart<") == 1  # a second time it would be clipped, and both not seen
    ids = [set(re.findall(r'id="([^"]+)"', svg([], name))) for name in "ab"]
    assert ids[0] and not ids[0] & ids[1]


def test_sizes_and_rates_read_as_people_say_them():
    assert [compact(n) for n in (98624, 2.4e6, 4.8e9, 512, 999_999)] == ["98.6k", "2.4M", "4.8B", "512", "1M"]
    assert [compact(flops) for flops in (1e16, 2.5e21)] == ["1e16", "2.5e21"]
    assert [compact(flops, flops=True) for flops in (1e11, 2.5e9)] == ["1e11", "2.5e9"]
    assert [compact(lr) for lr in (3e-4, 1e-2, 0.3, 1.0)] == ["3e-4", "1e-2", "3e-1", "1"]


def test_three_sizes_are_fitted_and_none_is_held_out(study, tmp_path):
    """With the largest held out two would be left, and two make no fit."""
    rows = [make_row(0.01, 3.0, d_model=width, model__qk_norm="none", run_id=f"w{width}") for width in (32, 64, 128)]
    for row in rows:
        row["diagnostics_at_step"] = {"step": 9, "attention_logit_max/0": float(row["model.d_model"])}
    write_report(study(rows, name="predict_logits"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "line in log N, because there are only three sizes" in page and "no fit" not in page


def test_figures_and_traces_are_kept_on_request(study, tmp_path):
    rows, traces = worlds.seeded(*worlds.qknorm_trace(True))
    place = study(rows, name="qknorm_trace", traces=traces, declared={"margins": {"recorded": 1.1}}).path
    kept, stem = tmp_path / "kept", tmp_path / "kept" / "figures"
    kept.mkdir()
    assert (
        analyze.main(
            ["report", str(place), "--out", f"{stem}.png", "--out", f"{stem}.svg", "--traces", str(kept / "metrics")]
        )
        == 0
    )
    assert (kept / "figures.png").read_bytes()[:4] == b"\x89PNG" and (kept / "figures.svg").exists()
    assert not list(place.glob("*.html")), "only figures were asked for"
    (kept / "results.jsonl").write_text((place / "results.jsonl").read_text())
    (kept / "sweep.json").write_text((place / "sweep.json").read_text())
    before, after = (write_report(load(where), tmp_path / "page.html")[:-1] for where in (place, kept))
    assert before == after and any(text.startswith("agrees") for text in after)
    assert load(kept).trace(rows[0]) and not load(kept).trace({"run_id": "other"})


def test_figures_that_cannot_be_drawn_are_said_and_no_page_is_written(study, tmp_path, capsys):
    place = study([{"run_id": "a", "n_params": 1e4, "loss": 3.0}], name="own").path
    assert analyze.main(["report", str(place), "--out", str(tmp_path / "kept" / "figure.png")]) == 0
    assert "no figure to draw" in capsys.readouterr().out and not list(tmp_path.rglob("*.html"))


def test_a_folder_is_judged_as_another_experiment_that_reads_its_runs(study, tmp_path, capsys):
    place = study(worlds.output_norm(True)[0], name="gradrms_scaling").path
    assert analyze.main(["report", str(place), "--experiment", "output_norm"]) == 0
    assert "It rises with depth." in capsys.readouterr().out and (place / "output_norm.html").exists()
    assert analyze.main(["report", str(place)]) == 0 and "It rises with depth." not in capsys.readouterr().out


def test_the_claims_of_another_experiment_than_the_declared_one_have_effects_and_no_verdict(study, capsys):
    place = study(worlds.seeded(*worlds.mup_simple_noqk(True))[0], name="mup_simple_lr").path
    declared = {"lr_range": [3e-4, 3e-1], "margins": MARGINS}
    about = {"paper": "small_scale_proxies", "experiment": "mup_simple_noqk", "declared": declared}
    (place / "sweep.json").write_text(json.dumps(about))
    assert analyze.main(["report", str(place), "--experiment", "mup_simple_noqk"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("agrees ") and "judged by: the claims of small_scale_proxies/mup_simple_noqk; S over" in said
    (place / "sweep.json").write_text(json.dumps({**about, "experiment": "mup_simple_lr"}))
    assert analyze.main(["report", str(place), "--experiment", "mup_simple_noqk"]) == 0
    said = capsys.readouterr().out
    assert "agrees" not in said and said.count("cannot tell") == 2 and "The effect is a factor of" in said
    reason = "The claims of small_scale_proxies/mup_simple_noqk were not declared before the runs: it declares those of"
    assert f"{reason} small_scale_proxies/mup_simple_lr. The effect is" in said


def test_each_rate_has_a_style_of_its_own_whatever_the_size(study):
    conditions = [{"optimizer__eps": eps} for eps in (1e-8, 1e-6)]
    found = study(grid(lambda *_: 3.0, conditions, lrs=(0.01, 0.3)), name="adam_eps")
    lines = against_key(curves(found, ["optimizer.eps"]), "optimizer.eps", lambda row: row["val_loss"], "loss").lines
    assert len(lines) == 6
    assert {(line.label, line.style) for line in lines} == {("learning rate 0.01", 0), ("learning rate 0.3", 1)}


def test_traces_have_a_panel_for_each_rate_and_the_first_seed(study):
    rows = grid(lambda *_: 3.0, [{"model__qk_norm": name} for name in ("none", "layernorm")], seeds=(0, 1))
    traces = {row["run_id"]: [{"step": 1, "train_loss": row["optimizer.lr"] + row["seed"]}] for row in rows}
    found = study(rows, traces=traces)
    drawn = trace_panels(found, curves(found, ["model.qk_norm"]), "train_loss", False)
    assert [panel.title for panel in drawn] == [f"learning rate {lr}, first seed" for lr in ("0.0003", "0.01", "0.3")]
    assert [[line.y[0] for line in panel.lines] for panel in drawn] == [[lr] * 6 for lr in (3e-4, 1e-2, 0.3)]


@pytest.mark.filterwarnings("error")
def test_fifteen_conditions_can_be_told_apart_and_are_all_named(study):
    names = [f"mitigation number {i}" for i in range(15)]
    rows = grid(lambda c, *_: 3.0 + names.index(c["logging__group"]), [{"logging__group": name} for name in names])
    found = lr_sensitivity.analyse(study(rows, name="mitigations"), ["logging.group"])
    panels = sensitivity_panels(found)
    looks = {(look["marker"], str(look["linestyle"])) for look in map(_look, panels[0].lines)}
    assert len(looks) == 15
    with _style(SCREEN):
        figure = _draw(panels[:1], SCREEN)
        figure.draw_without_rendering()
    assert {axes.get_title("left") for axes in figure.axes} == set(names)
    assert all(axes.get_window_extent().height > 1.2 * figure.dpi for axes in figure.axes)  # of inches


def test_a_page_of_claims_lets_no_markup_in(study, tmp_path):
    rows = [{**row, "label": "<b>x</b>", "status": "failed"} for row in worlds.qknorm_lr(True)[0][:2]]
    write_report(study([*worlds.qknorm_lr(True)[0][2:], *rows], name="qknorm_lr"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page.split("Figures")[0]


def test_a_page_shows_what_was_declared_when_and_how_claims_are_judged(study, tmp_path):
    rows = worlds.seeded(*worlds.qknorm_lr(True))[0]
    declared = {"lr_range": [3e-4, 3e-1], "margins": MARGINS, "date": "2026-01-02", "commit": "abcdef0123456789" * 2}
    page = tmp_path / "page.html"
    write_report(study(rows, declared=declared), page)
    text = page.read_text()
    assert "S over rates from 0.0003 to 0.3; critical rate at 0.25 nats above the best; margins: S 0.05 nats" in text
    assert "declared 2026-01-02 at commit abcdef012345, before any run had a result" in text
    assert "Judged by: S with qk-norm none less with layernorm/rmsnorm, mean over sizes" in text
    write_report(study(rows, declared={**declared, "changed": True, "results": 7}, folder=tmp_path / "b"), page)
    assert "changed 2026-01-02 at commit abcdef012345, when 7 runs had a result" in page.read_text()
    write_report(study(rows, folder=tmp_path / "c"), page)
    assert "declared no margins and no range of rates before its runs, so no claim is judged" in page.read_text()


def test_critical_rates_are_drawn_with_their_intervals_and_censored_ones_as_hollow_marks(study):
    rows = worlds.seeded(*worlds.qknorm_lr(True))[0]
    found = lr_sensitivity.analyse(study(rows), ["model.qk_norm"])
    panel = next(one for one in sensitivity_panels(found) if one.y_label == "critical learning rate")
    known, above = panel.lines[-1], panel.lines[0]
    assert above.hollow and set(above.y) == {0.3} and len(above.x) == 3
    assert len(known.x) == 3 and list(known.y) == sorted(known.y, reverse=True) and known.band is not None


def test_a_page_says_its_command_its_cost_and_links_to_its_rows(study, tmp_path, capsys):
    rows = [{**row, "wall_seconds": 1800.0, "world_size": 2, "name": "mine"} for row in worlds.qknorm_axis(True)[0][:4]]
    place = study(rows, name="a folder", sweep="qknorm_axis", declared={}).path
    for row in rows:
        (place / row["run_id"]).mkdir()
        (place / row["run_id"] / "result.json").write_text(json.dumps(row))
    out = tmp_path / "pages" / "page.html"
    typed = [
        "report",
        str(place),
        "--where",
        "seed=0",
        "--out",
        str(out),
        "--out",
        f"{tmp_path}/f.pdf",
        "--width",
        "single",
    ]
    assert analyze.main(typed) == 0
    found = Page(out.read_text())
    assert f"python -m scaling_testbed.analyze {shlex.join(typed)}" in found.text
    assert "python -m scaling_testbed.sweep run sweep=qknorm_axis name=mine" in found.text
    assert f"Made on{datetime.now(UTC).date()}" in found.text.replace("\n", "")
    assert "process-hours" in found.text and "\nall44" in found.text  # four runs of half an hour in two processes
    assert len(found.links) == 4 + 2 and all((out.parent / unquote(link)).exists() for link in found.links)
    assert all("://" not in link and not link.startswith("/") for link in found.links)


def arms(names, lrs, widths):
    """Rows whose arms differ in two keys, and the last one in N as well."""
    keys = [{"logging__group": name, "model__mlp": name, "optimizer__name": f"o{i}"} for i, name in enumerate(names)]
    rows = grid(
        lambda c, w, lr, s: 3.0 + lr + names.index(c["logging__group"]) + 0.01 * s, keys, widths, lrs, (0, 1, 2)
    )
    larger = lambda row: row["n_params_non_embedding"] * (1.33 if row["logging.group"] == names[-1] else 1)  # noqa: E731
    return [{**row, "n_params_non_embedding": int(larger(row)), "flops": 1e9} for row in rows]


def test_a_sweep_of_decisions_has_their_table_and_figure_and_arms_are_named_by_their_groups(study, tmp_path):
    place = study(arms(["base", "wide"], (1e-3, 1e-2), (32, 64)), name="decisions", declared={}).path
    about = json.loads((place / "sweep.json").read_text())
    (place / "sweep.json").write_text(json.dumps({**about, "paper": None, "experiment": None, "analysis": "decide"}))
    (place / "decide.csv").write_text("x")
    write_report(load(place), tmp_path / "page.html")
    found = Page((tmp_path / "page.html").read_text())
    assert "Decisions from small runs" in found.text and "Of all pairs by arm, the share whose order" in found.text
    assert "Do small runs choose between the arms" in found.text and "Claims" not in found.text
    assert "What was shortened" not in found.text and "logging.group: base" not in found.text
    assert [Path(link).name for link in found.links if link.endswith((".csv", ".jsonl"))] == [
        "results.jsonl",
        "decide.csv",
    ]


def test_small_multiples_are_by_width_where_conditions_of_one_width_differ_in_n(study):
    names = [f"arm {i}" for i in range(4)]
    found = lr_sensitivity.analyse(study(arms(names, (1e-3, 1e-2), (32, 64))), ["logging.group"])
    loss = sensitivity_panels(found)[0]
    assert [part.title for part in parts(loss)] == ["width = 32", "width = 64"]
    assert [len(part.lines) for part in parts(loss)] == [4, 4]


def test_a_study_at_one_rate_has_a_table_of_the_losses_of_its_arms(study, tmp_path):
    write_report(study(arms(["base", "wide"], (1e-2,), (32,)), name="arms"), tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "Final losses" in text and "base" in text and "3.02" in text and "0.01" in text and "runs: 3" in text


def test_a_width_that_has_no_effect_is_refused(study, tmp_path, capsys):
    place = str(study(worlds.qknorm_axis(True)[0], name="qknorm_axis").path)
    for verb, files in (("report", ["x.html"]), ("lr_sensitivity", ["x.csv"])):
        typed = [word for file in files for word in ("--out", str(tmp_path / file))]
        assert analyze.main([verb, place, "--width", "single", *typed]) == 2
        assert "--width applies to figures" in capsys.readouterr().err


def test_a_model_without_layers_has_a_color(study, tmp_path):
    """It has N = 0, which has no logarithm."""
    rows = grid(lambda c, w, lr, s: 3.0 + lr, [{}], widths=[32], lrs=(3e-4, 3e-1)) + grid(
        lambda c, w, lr, s: 4.0 + lr, [{}], widths=[32], lrs=(3e-4, 3e-1), n_layers=0
    )
    write_report(study(rows), tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()
