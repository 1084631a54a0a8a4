"""A column that does not count ones is noticed by sizes, tokens and compute together; one that does is left alone."""

import math

import numpy as np
import pytest

from scaling_testbed.analysis.rows.units import check_losses, check_units, said_unit
from scaling_testbed.errors import ConfigError

SIZES, TOKENS = (5e7, 2e8, 8e8, 1.6e9), (1e9, 4e9, 3.2e10)
UNITS = {
    "thousands": (lambda x: x / 1e3, "{}*1e3"),
    "millions": (lambda x: x / 1e6, "{}*1e6"),
    "billions": (lambda x: x / 1e9, "{}*1e9"),
    "log10": (math.log10, "10**{}"),
    "ln": (math.log, "exp({})"),
}
LAW = ("n_params", "n_tokens", "loss")


def rows_of(n=lambda x: x, d=lambda x: x, c=None, sizes=SIZES, tokens=TOKENS):
    """Rows over sizes and tokens, each column in a unit of its own; without compute, it is 6ND and derived."""
    found = []
    for place, (size, seen) in enumerate(((a, b) for a in sizes for b in tokens), 1):
        row = {"row": place, "n_params": n(size), "n_tokens": d(seen), "loss": 3.0}
        row |= {"flops": c(6 * size * seen)} if c else {"flops": 6 * n(size) * d(seen), "derived": ["flops"]}
        found.append(row)
    return found


def refused(rows, typed=None, told=(), used=LAW):
    with pytest.raises(ConfigError) as error:
        check_units(rows, used, typed or {}, told)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("n", ["millions", "billions", "log10", "ln"])
@pytest.mark.parametrize("d", ["millions", "billions", "log10", "ln", None])
def test_a_column_in_another_unit_is_refused_with_the_map_that_mends_it(n, d):
    rows = rows_of(UNITS[n][0], UNITS[d][0] if d else lambda x: x)
    typed = {"n_params": "size", "n_tokens": "seen"}
    said = refused(rows, typed)
    assert f'--map n_params="{UNITS[n][1].format("size")}"' in said
    assert d is None or f'--map n_tokens="{UNITS[d][1].format("seen")}"' in said
    assert ("n_tokens=" in said) == (d is not None)
    assert check_units(rows, LAW, typed, {"n_params", "n_tokens"}) is not None  # told by a factor: not refused


@pytest.mark.parametrize("d", ["millions", "billions", "log10", "ln"])
def test_tokens_alone_in_another_unit_are_refused(d):
    said = refused(rows_of(d=UNITS[d][0]))
    assert f'--map n_tokens="{UNITS[d][1].format("n_tokens")}"' in said and "--map n_params" not in said


@pytest.mark.parametrize("typed", ["1e12", "1e15", "1e18", "1e21", "8.64e19"])
def test_compute_in_another_unit_is_refused(typed):
    said = refused(rows_of(c=lambda x: x / float(typed)), used=("flops", "loss"))
    assert f'--map flops="flops*{typed}"' in said and "n_params" not in said
    assert '--map flops="10**flops"' in refused(rows_of(c=math.log10), used=("flops", "loss"))


def test_thousands_are_noticed_where_compute_disagrees():
    """Without it, a million parameters in thousands are a nano model."""
    said = refused(rows_of(UNITS["thousands"][0], UNITS["thousands"][0], c=lambda x: x))
    assert '--map n_params="n_params*1e3" --map n_tokens="n_tokens*1e3"' in said


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ((1e4,), (1e5,)),  # a nano study
        ((6_224, 24_736, 98_624), (819_200, 1_638_400)),
        ((500, 4_000), (1e6, 1e7)),
        ((768, 1_000_000), (1.5e7, 1e8)),
        ((70e9, 175e9), (300e9, 1.4e12)),  # GPT-3, Chinchilla
        ((0.6e9,), (36e12,)),  # Qwen3: 60,000 tokens per parameter
        ((1.5e9,), (22e6,)),  # Kaplan et al.: limited by data
        ((1e12,), (15e12,)),
    ],
)
def test_true_units_are_left_alone(sizes, tokens):
    rows = rows_of(sizes=sizes, tokens=tokens)
    assert [text for text in check_units(rows, LAW, {}, ()) if "tenth of a token" not in text] == []
    counted = rows_of(c=lambda x: x * 1.3, sizes=sizes, tokens=tokens)  # attention's operations too
    assert [text for text in check_units(counted, LAW, {}, ()) if "tenth of a token" not in text] == []


def test_compute_and_size_alone_show_a_unit_too():
    """Tokens that follow from them are far beyond any run's."""
    rows = [{"n_params": n / 1e6, "flops": 6 * n * d, "n_tokens": 6 * n * d / (6 * n / 1e6), "derived": ["n_tokens"]}
            for n in SIZES for d in TOKENS]  # fmt: skip
    assert '--map n_params="n_params*1e6"' in refused(rows)
    sizes = [{"n_params": n / 1e6, "loss": 3.0} for n in SIZES]
    assert '--map n_params="n_params*1e6"' in refused(sizes, used=("n_params", "loss"))


def test_a_wrong_unit_that_the_law_does_not_use_is_no_reason_to_refuse():
    rows = rows_of(UNITS["millions"][0], c=lambda x: x)
    assert check_units(rows, ("n_tokens", "loss"), {}, ()) is not None


def test_a_header_that_names_its_unit_is_believed_where_the_values_allow_it():
    rows = rows_of(lambda x: x / 1e6, lambda x: x / 1e6, sizes=(1e10, 7e10), tokens=(2e11, 1.4e12))
    assert check_units(rows, LAW, {}, ()) == []  # 10,000 to 70,000 parameters, 200,000 tokens: a nano study
    said = refused(rows, {"n_params": "Params (M)", "n_tokens": "tokens_m"})
    assert '--map n_params="Params (M)*1e6" --map n_tokens="tokens_m*1e6"' in said
    assert check_units(rows_of(), LAW, {"n_params": "params_m", "n_tokens": "tokens_b"}, ()) == []  # they are ones


def test_two_units_in_one_column_are_refused_with_a_row():
    rows = rows_of()
    rows[3]["n_params"] /= 1e6
    said = refused(rows)
    assert "1 of 12 rows seem to have n_params in millions, e.g. row 4 (n_params 200," in said


def test_rows_of_this_testbed_are_not_judged():
    rows = [{**row, "schema_version": 1} for row in rows_of(UNITS["millions"][0])]
    assert check_units(rows, LAW, {}, ()) == []


def test_what_no_unit_explains_is_a_warning():
    (said,) = check_units(rows_of(c=lambda x: 40 * x), ("flops", "loss"), {}, ())
    assert said.startswith("FLOPs are 40 times 6 N D")


@pytest.mark.parametrize(
    ("header", "ours", "unit"),
    [
        ("Params (M)", "n_params", "millions"), ("params_m", "n_params", "millions"),
        ("tokens_b", "n_tokens", "billions"),
        ("Tokens [B]", "n_tokens", "billions"), ("N / 1e6", "n_params", "millions"), ("D/1e9", "n_tokens", "billions"),
        ("log10_N", "n_params", "decimal logarithms"), ("log10(D)", "n_tokens", "decimal logarithms"),
        ("ln N", "n_params", "natural logarithms"), ("lnN", "n_params", "natural logarithms"),
        ("n_params (millions)", "n_params", "millions"), ("Parameters in millions", "n_params", "millions"),
        ("Tokens (in billions)", "n_tokens", "billions"), ("tokens (B tokens)", "n_tokens", "billions"),
        ("params_k", "n_params", "thousands"), ("tokens_T", "n_tokens", "trillions"),
        ("paramsM", "n_params", "millions"),
        ("Model Size (B)", "n_params", "billions"), ("size_M", "n_params", "millions"), ("PF-days", "flops", "PF-days"),
        ("EFLOPs", "flops", "1e18 FLOPs"), ("train_eflops", "flops", "1e18 FLOPs"),
        ("C (1e18)", "flops", "1e18 FLOPs"), ("config.params_m", "n_params", "millions"),
    ],
)  # fmt: skip
def test_the_unit_of_a_header(header, ours, unit):
    found = said_unit(header)
    assert found and (found[0], found[1].name) == (ours, unit)


@pytest.mark.parametrize("header", ["n_params", "N", "tokens", "model", "loss", "batch_m", "log_dir"])
def test_a_header_without_a_unit(header):
    assert said_unit(header) is None


def losses(values, column="loss", told=False, **more):
    return check_losses([{"row": i, "loss": value, **more} for i, value in enumerate(values, 1)], column, told)


@pytest.mark.parametrize(
    ("values", "column", "mend"),
    [
        ((18.0, 25.0, 41.0), "loss", 'loss="log(loss)"'),
        ((8.0, 9.5, 11.0), "ppl", 'loss="log(ppl)"'),
        ((8.0, 9.5, 11.0), "Val Perplexity", 'loss="log(Val Perplexity)"'),
        ((0.45, 0.5), "log10_loss", 'loss="10**log10_loss"'),
        ((-3.0, -2.9), "loss", 'loss="loss*-1"'),
    ],
)
def test_a_loss_that_is_not_in_nats_is_refused_with_the_map_that_mends_it(values, column, mend):
    with pytest.raises(ConfigError) as error:
        losses(values, column)
    assert f"--map {mend}" in str(error.value)
    assert losses(values, column, told=True) == []


def test_losses_above_a_uniform_guess_over_the_vocabulary_are_perplexities():
    with pytest.raises(ConfigError, match="above that of a uniform guess"):
        losses((6.5, 7.0), vocab_size=256)
    assert losses((5.5, 3.0), vocab_size=256) == [] and losses((6.5, 7.0)) == []


def test_bits_are_a_warning_because_the_law_has_the_same_form_in_them():
    (said,) = losses((0.9, 1.1), "val_bpb")
    assert 'seems to be in bits, and so are E and the predictions; --map loss="val_bpb*0.693147" gives nats' in said


def test_losses_in_nats_are_left_alone():
    assert losses((3.0, 2.5, 4.1)) == losses((1.2, 0.8)) == losses((10.9, 10.2)) == losses((3.0,), "log_ppl") == []
    assert losses((3.0, 2.0), n_params=1e9, n_tokens=1e11) == []


def test_a_few_high_losses_are_named_and_large_models_of_high_loss_are_suspected():
    (said,) = losses((3.0, 45.0, 2.9))
    assert "1 losses are above that of a uniform guess, e.g. row 2 (45): diverged runs?" in said
    (said,) = losses((7.3, 5.7, 5.1), n_params=7e9, n_tokens=1e12)
    assert '--map loss="log(loss)"' in said


def test_a_random_table_of_plausible_runs_is_left_alone():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = 10 ** rng.uniform(3.5, 12)
        ratios = 10 ** rng.uniform(-0.5, 4, size=8)
        rows = [
            {"row": i, "n_params": size, "n_tokens": max(size * ratio, 1e3), "loss": 3.0}
            for i, ratio in enumerate(ratios)
        ]
        assert check_units(rows, LAW, {}, ()) == []
