"""Settings are told from measurements, and the one that a law would have to know is named."""

import numpy as np
import pytest

from scaling_testbed.analysis.laws.columns import best_of_each
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.settings import setting_columns
from scaling_testbed.analysis.laws.study import Fitting, fit_rows, law_rows
from tests.analysis.laws.planted import CHINCHILLA

QUICK = Fitting(starts=8, bootstrap=0)


def runs(effect=0.02, seed=0, key="data", values=("code", "prose", "web"), count=60):
    """Runs of a planted law, whose losses differ by `effect` between neighbouring values of a setting."""
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(count):
        n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e9))), np.exp(rng.uniform(np.log(1e9), np.log(1e11)))
        at = place % len(values)
        loss = float(LAWS["chinchilla"].predict(CHINCHILLA, {"n_params": n, "n_tokens": d}))
        loss *= np.exp(effect * at + 0.003 * rng.standard_t(3))
        rows.append(
            {"n_params": float(n), "n_tokens": float(d), "loss": float(loss), key: values[at], "seed": place % 5}
        )
    return rows


def said_of(rows, **options):
    return [
        text
        for text in fit_rows(law_rows(rows), LAWS["chinchilla"], fitting=QUICK, **options).warnings
        if "explain" in text
    ]


@pytest.mark.parametrize(("key", "values"), [("data", ("code", "prose", "web")), ("Batch Size", (64, 128, 256, 512))])
def test_a_column_that_explains_the_residuals_is_named_with_what_to_type(key, values):
    (said,) = said_of(runs(key=key, values=values))
    assert said.startswith(f"{key} has {len(values)} values, and they explain ")
    typed = f'the law describes all of them; select with --where "{key}={values[0]}"'
    assert said.endswith(typed if key != "data" else f"{typed}, or fit the groups together with --by data")
    assert said_of(runs(key=key, values=values), where=[f"{key}={values[0]}"]) == []


def test_a_column_without_effect_is_named_in_at_most_one_study_of_a_hundred():
    assert sum(bool(said_of(runs(effect=0.0, seed=seed))) for seed in range(30)) <= 1


def test_a_setting_that_follows_from_an_input_cannot_be_told_from_it():
    rows = runs(effect=0.0)
    median = np.median([row["n_params"] for row in rows])
    for row in rows:
        row["batch"], row["loss"] = (64, row["loss"]) if row["n_params"] < median else (256, row["loss"] * 1.02)
    assert said_of(rows) == []


def test_names_seeds_measurements_and_results_are_no_settings():
    rows = [
        {"n_params": 10, "loss": 2.0, "train_seed": i % 2, "run_name": "ab"[i % 2], "time": i, "lr": i % 2, "same": 1}
        for i in range(8)
    ]
    assert setting_columns(rows) == ["lr"] and setting_columns(rows, ["lr"]) == []
    ours = [
        {**row, "schema_version": 1, "optimizer.lr": row["lr"], "data_fingerprint": row["run_name"]} for row in rows
    ]
    assert setting_columns(ours) == ["optimizer.lr", "data_fingerprint"]


def test_a_best_rate_is_profiled_over_batches_and_averaged_over_seeds_only():
    """At rate 1 the batches have 3.0 and 4.0, at rate 2 both have 3.4: the mean prefers 2, and the best run has 1."""
    losses = {(1, 32): 3.0, (1, 64): 4.0, (2, 32): 3.4, (2, 64): 3.4}
    rows = [
        {"n_params": n, "lr": lr, "batch": batch, "seed": seed, "loss": loss + 0.3 * (-1) ** seed * (lr == 2)}
        for n in (10, 20)
        for (lr, batch), loss in losses.items()
        for seed in (0, 1)
    ]
    kept, said = best_of_each(rows, LAWS["optimal_lr"])
    assert [(row["n_params"], row["lr"], row["batch"]) for row in kept] == [(10, 1, 32), (20, 1, 32)]
    assert "each lr is taken at its best batch; choose others with --where" in said
    assert not any(
        "its best" in text for text in best_of_each([row for row in rows if row["batch"] == 32], LAWS["optimal_lr"])[1]
    )
