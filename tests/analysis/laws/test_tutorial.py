"""The tutorial docs/tutorials/from_a_table.md: its table, and the numbers that it prints."""

import json

import pytest

from scaling_testbed.analyze import main

TABLE = ["examples/olmo_ladder.csv", "--map", "loss=c4_loss", "--where", "mult!=0.5xC"]
HOLD_OUT = ["--hold-out", "size=7B or size=13B"]
PAGE = "docs/tutorials/from_a_table.md"


def test_the_coupled_law_predicts_both_targets_as_the_page_says(capsys):
    assert main(["laws", *TABLE, *HOLD_OUT, "--bootstrap", "0", "--starts", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["laws"][0]["law"] == "coupled" and found["laws"][0]["share"] == 1
    with open(PAGE) as page:
        lines = page.read()
    for law in found["laws"]:
        assert f"{law['error_of_dearer_runs']:.4g}"[:7] in lines
    assert [one["inside"] for one in found["predictions"]] == [True, True]
    for one in found["predictions"]:
        assert f"{one['actual']:.4g}  " in lines and f"{one['predicted']:.4g}  " in lines


def test_the_best_size_is_that_of_the_page(tmp_path, capsys):
    fit = str(tmp_path / "fit.json")
    assert main(["fit", *TABLE, *HOLD_OUT, "--law", "coupled", "--bootstrap", "0", "--starts", "16", "--out", fit]) == 0
    capsys.readouterr()
    assert main(["allocate", fit, "--flops", "1e22", "--inference-tokens", "5T", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert (plans[0]["n_params"], plans[0]["n_tokens"]) == pytest.approx((4.812e9, 3.463e11), rel=1e-3)
    cheapest = min((one for one in plans if one["total_flops"]), key=lambda one: one["total_flops"])
    assert cheapest["n_params"] == pytest.approx(2.676e9, rel=1e-3)
    assert cheapest["times_compute"] == pytest.approx(1.466, rel=1e-3)
