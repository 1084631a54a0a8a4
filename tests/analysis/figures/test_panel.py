"""What a figure says: its lines and small multiples, its bands, its captions and what it leaves out."""

import dataclasses
import re

import pytest

from scaling_testbed.analysis.curves import lr_sensitivity
from scaling_testbed.analysis.figures import drawing
from scaling_testbed.analysis.figures.batch_panels import critical_batch_panels
from scaling_testbed.analysis.figures.panel import Line, Panel, described, notes, parts, split_by, too_wide, y_limits
from scaling_testbed.analysis.figures.panels import _few, sensitivity_panels
from scaling_testbed.analysis.figures.words import condition, in_sentence, setting, settings, word
from scaling_testbed.errors import ConfigError
from tests.analysis.conftest import grid


def panel(labels, sizes, **more):
    lines = [
        Line(x=[1e-3, 1e-2], y=[3.0, 4.0], label=label, n_params=size, style=style)
        for style, label in enumerate(labels)
        for size in sizes
    ]
    return Panel(lines=lines, x_label="x", y_label="y", split=True, **more)


def test_more_than_six_lines_become_one_small_panel_for_each_size_or_each_of_many_conditions():
    assert split_by(panel("ab", (1e4, 1e5, 1e6))) == ""
    by_size = panel("abc", (1e4, 1.02e4, 1e5, 1e6))  # two of the sizes differ by the gains of a norm only
    assert [part.title for part in parts(by_size)] == ["N = 10k", "N = 100k", "N = 1M"]
    assert [len(part.lines) for part in parts(by_size)] == [6, 3, 3]
    by_label = panel("abcdefgh", (1e4, 1e5))
    assert [part.title for part in parts(by_label)] == list("abcdefgh")
    assert all(len(part.lines) == 2 and len(part.behind) == 14 for part in parts(by_label))
    assert split_by(dataclasses.replace(by_label, split=False)) == ""
    drawn = drawing.inline_svgs(by_size, "f")
    assert len(drawn) == 4 and [name in drawn[-1] for name in (">a<", ">N = 10k<")] == [True, False]


@pytest.mark.parametrize("log", [False, True])
def test_an_interval_wider_than_the_axes_is_said_and_does_not_flood_the_panel(log):
    near = Line(x=[1.0, 2.0], y=[3.0, 4.0], label="near", band=([2.9, 3.5], [3.1, 4.5]))
    far = Line(x=[1.0, 2.0], y=[3.0, 4.0], label="far", style=1, band=([-1e9, 3.9], [1e9, 4.1]))
    both = Panel(lines=[near, far], x_label="x", y_label="y", y_log=log)
    low, high = y_limits(both)
    assert (0 if log else -1) < low < 2.9 and 4.5 < high < 10
    assert too_wide(far, (low, high)) == [True, False] and too_wide(near, (low, high)) == [False, False]
    assert notes(both) == ["Interval wider than the axes, and not drawn: far."]
    alone = dataclasses.replace(both, lines=[near])
    assert notes(alone) == [] and y_limits(alone)[0] < 2.9 and y_limits(alone)[1] > 4.5
    said = [drawing.WIDER in drawing.inline_svgs(one, "f")[0] for one in (both, alone)]
    assert said == [True, False]


def test_a_loss_has_the_range_of_its_seeds_and_says_its_seeds_its_crosses_and_what_is_left_out(study):
    rows = grid(lambda c, w, lr, seed: 3.0 + 0.1 * seed + (9 if lr == 0.3 else 0), [{}], seeds=(0, 1, 2))
    rows[-1]["status"] = "failed"
    loss, *others = sensitivity_panels(lr_sensitivity.analyse(study(rows), []))
    assert [ends[0] for ends in loss.lines[0].band] == [3.0, 3.2] and loss.lines[0].y[0] == pytest.approx(3.1)
    assert (
        "Mean over 2 to 3 seeds. Shaded: from the lowest to the highest seed. A cross: a seed diverged." in loss.caption
    )
    assert notes(loss) == ["Left out: N = 393k: 1 of 21 runs, without a result."]
    assert any("S of N = " in line and "missing" in line for one in others for line in notes(one))
    one_seed = sensitivity_panels(lr_sensitivity.analyse(study(rows[::3]), []))[0]
    assert "One seed." in one_seed.caption and "Shaded" not in one_seed.caption and one_seed.lines[0].band is None


def test_labels_of_small_multiples_lie_inside_their_drawings_whatever_their_length():
    labels = [f"z-loss: {n}, weight decay: 0.0001, precision: bf16" for n in range(8)]
    small = dataclasses.replace(panel(labels, (16, 3e3)), y_label="mean square of log Z, mean of the last steps")
    small = dataclasses.replace(
        small, x_log=False, lines=[dataclasses.replace(one, x=[0, 12500]) for one in small.lines]
    )
    with drawing._style(drawing.SCREEN):
        figures = drawing._small_multiples(small)
        boxes = [(figure.axes[0].get_tightbbox(), figure.bbox) for figure in figures]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= f.x1 and b.y1 <= f.y1 for b, f in boxes)
    assert len({figure.axes[0].get_position().bounds for figure in figures}) == 1
    assert described(small) == "Grey: the curves of the other panels."


@pytest.mark.parametrize("longest", range(17, 60))
def test_a_label_breaks_at_its_commas_where_its_parts_fit(longest):
    label = "z-loss: 0, weight decay: 0, precision: bf16"  # its longest part has 15 letters, and a comma
    lines = drawing._plain(label, longest).split("\n")
    assert " ".join(lines) == label and max(map(len, lines)) <= longest


def test_a_reason_is_said_once_and_whole():
    long = "its learning rate is another quantity than AdamW's " * 4
    assert _few([long, "b", long]) == [f"Left out: {long} (2 times).", "Left out: b."]


def test_many_intervals_over_the_same_sizes_become_small_multiples():
    def crowd(count):
        lines = [Line(x=[1, 2], y=[3, 4], label=str(i), band=([2, 3], [4, 5])) for i in range(count)]
        return Panel(lines=lines, x_label="N", y_label="S", split=True)

    assert split_by(crowd(3)) == "" and split_by(crowd(4)) == "label"


def test_two_panels_of_two_small_multiples_share_a_row():
    nine = [panel("abcd", (1e3, 1e4), title=f"rate {n}") for n in range(9)]
    with drawing._style(drawing.SCREEN):
        width, height = drawing._draw(nine, drawing.SCREEN).get_size_inches()
    assert height < 1.6 * width
    assert drawing.SCREEN.columns < 4


def test_a_loss_has_one_color_in_all_panels_of_the_critical_batch():
    records = [
        {
            "n_params": n,
            "loss": loss,
            "critical_batch": 100.0,
            "s_min": 10.0,
            "low": None,
            "steps/8": 90,
            "steps/64": 20,
        }
        for n, losses in ((1e3, (2.4, 2.6)), (1e4, (2.0, 2.4)))
        for loss in losses
    ]
    with drawing._style(drawing.SCREEN):
        shown = [(one, drawing._colors(one)) for one in critical_batch_panels(records)[:2]]
        colors = {color(line) for one, color in shown for line in one.lines if line.n_params == 2.4}
    assert len(colors) == 1


def test_keys_and_quantities_are_words():
    assert word("grad_rms/blocks.0.mlp.mlp_in.weight") == "gradient RMS, MLP input matrix of block 0"
    assert word("grad_rms/head.weight") == "gradient RMS, head.weight"
    assert condition({"logging.group": "muon"}) == "muon"
    said = {"model.qk_norm": "qk-norm", "optimizer.lr": "learning rate", "mine.a_key": "a key"}
    assert {key: word(key) for key in said} == said and word("optimizer.name") == "optimizer"
    assert word("attention_logit_max/0") == "largest attention logit, block 0"
    assert condition({"model.qk_norm": "none", "model.kappa": "null"}) == "qk-norm: none, kappa: not set"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("attention_logit_max/0", "largest attention logit of block 0"),
        ("grad_rms/blocks.0.mlp.mlp_in.weight", "gradient RMS of the MLP input matrix of block 0"),
        ("grad_rms/head.weight", "gradient RMS of head.weight"),
        ("my_own/blocks.0.x", "my_own/blocks.0.x"),
        ("train_loss", "training loss"),
        ("lr", "learning rate"),
    ],
)
def test_a_quantity_in_a_sentence_has_no_comma_and_no_unit(key, said):
    assert in_sentence(key) == said


def test_settings_in_a_sentence_have_no_colons():
    assert settings({"model.qk_norm": "none", "model.kappa": "null"}) == "qk-norm none, kappa not set"
    assert setting("logging.group", "muon") == "muon" and settings({}) == "all runs"
    assert setting("data.weights.noise", "0.5") == "weight of noise 0.5"


@pytest.mark.parametrize(("width", "inches"), [("single", 3.3), ("double", 6.9)])
def test_a_pdf_has_the_width_of_a_column_and_holds_its_fonts(tmp_path, width, inches):
    path = tmp_path / "figure.pdf"
    drawing.save([panel("ab", (1e4,))], [path], width)
    content = path.read_bytes()
    (points,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", content)
    assert float(points) == pytest.approx(72 * inches) and b"/FontFile2" in content and b"/Type3" not in content
    drawing.save([panel("ab", (1e4,))], [tmp_path / "again.pdf"], width)
    assert (tmp_path / "again.pdf").read_bytes() == content
    with pytest.raises(ConfigError, match="--width must be one of single, double; got 'wide'"):
        drawing.check_width("wide")


def test_small_multiples_have_the_title_of_their_panel(tmp_path):
    split = panel([f"label {n}" for n in range(4)], [1e3, 1e4], title="learning rate 0.1")
    assert split_by(split)
    drawing.save([split], [tmp_path / "f.svg"])
    assert "learning rate 0.1" in (tmp_path / "f.svg").read_text()
