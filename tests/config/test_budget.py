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
