"""Names lead to one entry each, whoever registered it."""

import pytest

from scaling_testbed.errors import ConfigError
from scaling_testbed.registry import Registry, resolve


def test_a_decorator_registers_and_returns_what_it_decorates():
    shapes = Registry("shape")

    @shapes.register("round")
    def circle():
        return 1

    assert shapes == {"round": circle} and circle() == 1


def test_a_name_is_taken_once_and_the_message_says_by_whom():
    shapes = Registry("shape")
    shapes.add("round", 1, module="mine")
    shapes.add("round", 2, module="mine")  # a reload
    with pytest.raises(ConfigError, match="the shape 'round' is registered already by mine"):
        shapes.add("round", 3, module="yours")
    assert shapes["round"] == 2


def test_without_a_word_the_calling_module_is_who_adds():
    """So that nobody takes another's name by leaving it out."""
    shapes = Registry("shape")
    shapes.add("round", 1)
    shapes.add("round", 2)
    stranger = {"__name__": "stranger", "shapes": shapes}
    with pytest.raises(ConfigError, match="'round' is registered already by tests.test_registry"):
        exec("shapes.add('round', 3)", stranger)
    assert shapes.name_of(2) == "round"
    with pytest.raises(LookupError):
        shapes.name_of(3)


def test_a_text_is_resolved_when_it_is_asked_for():
    assert resolve("math:pi") == pytest.approx(3.14159, abs=1e-5)
    assert resolve(len) is len
