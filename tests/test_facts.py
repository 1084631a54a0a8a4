"""What is true of a part, an optimizer, a schedule or a source stands in its own file: nobody else asks which it is."""

import ast
import inspect

import pytest

from scaling_testbed.config.run import GROUPS
from scaling_testbed.learning.config import LOSS_IMPLS
from scaling_testbed.model import parts
from scaling_testbed.model.config import PARAMETRIZATIONS
from tests.test_architecture import PACKAGE, modules

KINDS = [value for value in vars(parts).values() if isinstance(value, parts.Parts)]
PART_NAMES = {name for kind in KINDS for name in kind}
PATHS = {*LOSS_IMPLS, *parts.ATTENTION_IMPLS, *parts.QK_NORM_IMPLS}
# Without "auto", which is also a device, a precision, ...
NAMES = (PART_NAMES | PATHS | set(PARAMETRIZATIONS) | set(GROUPS["optimizer"])) - {"auto"}

# File -> the names that it may ask for, because it is where what is true of them stands.
OWN = {
    "model/parts.py": NAMES,
    "kernels/cross_entropy/triton.py": {"recompute"},  # its own variants
    "kernels/qk_norm_rope/triton.py": {"none"},  # the kinds of a kernel, compile-time constants
    "kernels/qk_norm_rope/triton_kernels.py": {"none", "layernorm"},
    "learning/config.py": PATHS,  # of the loss
    "sweeps/grid.py": {"together"},  # a key of sweep files
    "learning/loss.py": PATHS,
    "learning/interventions/sigma_reparam.py": {"sigma_reparam"},
}


def config_classes():
    """Class name -> the file that defines it, of every optimizer, schedule and source and of what they share."""
    found = {}
    for group in ("optimizer", "schedule", "data"):
        for kind in GROUPS[group].values():
            for cls in inspect.getmro(kind):
                if cls.__module__.startswith(PACKAGE + "."):
                    found[cls.__name__] = cls.__module__.removeprefix(PACKAGE + ".").replace(".", "/") + ".py"
    return found


CLASSES = config_classes()


def texts(node):
    """The strings that a comparison with `node` compares with."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return [text for element in node.elts for text in texts(element)]
    if isinstance(node, ast.Dict):
        return [text for key in node.keys if key is not None for text in texts(key)]
    return []


def questions(relative, tree):
    """What the module asks by name or by class, outside of their own files."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            asked = [text for side in (node.left, *node.comparators) for text in texts(side)]
        elif isinstance(node, ast.MatchValue):
            asked = texts(node.value)
        else:
            asked = []
        yield from (f"{relative}: compares with {name!r}" for name in asked if name in NAMES - OWN.get(relative, set()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
            named = {getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node.args[1])}
            foreign = (name for name in sorted(named & CLASSES.keys()) if CLASSES[name] != relative)
            yield from (f"{relative}: {node.func.id} {name}" for name in foreign)


@pytest.mark.fault(
    "A17", "What a new optimizer or normaliser says of itself decides its memory, its S and its padding."
)
def test_nobody_asks_which_part_or_optimizer_it_is():
    found = {question for relative, tree in modules() for question in questions(relative, tree)}
    assert found == set()


@pytest.mark.parametrize(
    "code",
    [
        'model.mlp == "swiglu"',
        '"relu2" != x',
        'name in ("adamw", "muon")',
        'name not in {"deepnorm": 1}',
        "isinstance(run.optimizer, MuonConfig)",
        "issubclass(kind, (int, corpora.TextSource))",
        'match x:\n    case "softmax" | "other": pass',
    ],
)
def test_a_question_would_be_noticed(code):
    assert len(set(questions("sweeps/plan.py", ast.parse(code)))) == code.count("adamw") + 1


def test_a_question_in_the_own_file_and_another_word_are_none():
    assert not list(questions("model/parts.py", ast.parse('x == "swiglu"')))
    assert not list(questions(CLASSES["MuonConfig"], ast.parse("isinstance(x, MuonConfig)")))
    assert not list(questions("sweeps/plan.py", ast.parse('x == "finished"\nisinstance(x, int)')))


def test_every_kind_of_part_is_looked_at():
    assert len(KINDS) == 9 and {"softmax", "relu2", "swiglu", "deepnorm", "sigma_reparam", "muon", "adamw"} <= NAMES
