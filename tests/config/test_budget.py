"""The four units of a budget agree, and only one may be given."""

from types import SimpleNamespace

import pytest

from scaling_testbed.config.budget import BudgetConfig
from scaling_testbed.errors import ConfigError

COUNTS = SimpleNamespace(n_params=1_000_000, n_params_non_embedding=400_000, n_params_no_input_embedding=700_000)


def test_the_same_budget_in_four_units_is_the_same_number_of_steps():
    tokens = 20_000_000
    for budget in (
        BudgetConfig(tokens=tokens),
        BudgetConfig(tokens_per_param=20),
        BudgetConfig(flops=6 * 1e6 * tokens),
        BudgetConfig(steps=5000),
        BudgetConfig(),
    ):
        assert budget.resolve_steps(COUNTS, tokens_per_step=4000) == 5000


def test_the_counting_convention_decides_what_a_parameter_is():
    budget = BudgetConfig(tokens_per_param=20, params="n_params_non_embedding")
    assert budget.resolve_steps(COUNTS, tokens_per_step=4000) == 2000


def test_two_budgets_at_once_are_refused_naming_both():
    with pytest.raises(ConfigError, match=r"budget\.tokens=10 and budget\.steps=10"):
        BudgetConfig(tokens=10, steps=10)


def test_a_budget_below_one_step_is_one_step_and_a_negative_one_is_refused():
    assert BudgetConfig(tokens=1).resolve_steps(COUNTS, 4000) == 1
    with pytest.raises(ConfigError, match="tokens"):
        BudgetConfig(tokens=-1)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"tokens": 1e4}, "budget.tokens=10000 is 2.50 steps of 4,000 tokens; rounded to 2 steps, 8,000 tokens"),
        ({"tokens": 1}, "budget.tokens=1 is 0.00 steps of 4,000 tokens; rounded to 1 step, 4,000 tokens"),
        ({"steps": 2.5}, "budget.steps=2.5 is 2.50 steps of 4,000 tokens; rounded to 3 steps, 12,000 tokens"),
        (
            {"flops": 6.01e12},
            "budget.flops=6.01e+12 is 250.42 steps of 4,000 tokens; rounded to 250 steps, 1,000,000 tokens",
        ),
        ({"flops": 6e12}, None),
        ({"tokens_per_param": 0.5}, None),
        ({}, None),
        ({"steps": 3}, None),
        ({"tokens": 20_000_010}, None),  # 5,000.0025 steps
    ],
)
def test_what_is_rounded_away_is_said(budget, said):
    assert BudgetConfig(**budget).rounding(COUNTS, tokens_per_step=4000) == said


def test_the_default_budget_is_named_where_it_is_rounded():
    said = "budget.tokens_per_param=20 is 6,666.67 steps of 3,000 tokens; rounded to 6,667 steps, 20,001,000 tokens"
    assert BudgetConfig().rounding(COUNTS, tokens_per_step=3000) == said
