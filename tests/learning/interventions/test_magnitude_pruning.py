"""Which weights are pruned, when, and how many; any sharding prunes the same."""

import math
import threading

import pytest
import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.interventions.base import Context
from scaling_testbed.learning.interventions.magnitude_pruning import MagnitudePruning
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer

CONFIG = ModelConfig(d_model=16, n_layers=2, n_heads=2).resolved(12)


def model(change=None):
    built = Transformer(CONFIG)
    built.init_weights(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if change is not None and parameter.dim() == 2:
                parameter.copy_(change(name, parameter))
    return built


def attached(built, **options):
    pruning = MagnitudePruning(**options)
    pruning.attach(Context(model=built, optimizer=None, sum=list, largest=list))
    return pruning


def matrices(built):
    """The pruned matrices in a row: all but the embedding."""
    return [p for name, p in built.named_parameters() if p.dim() == 2 and name != "embedding.weight"]


@pytest.mark.parametrize(
    ("sparsity", "steps", "first", "last"), [(0.6, 26_800, 4100, 16_600), (0.5, 72_200, 12_500, 47_200)]
)
def test_the_events_are_those_of_the_authors_runs(sparsity, steps, first, last):
    """Of the configurations of 58M and of 1B parameters in github.com/tjingrant/sparse-llm-code."""
    events = MagnitudePruning(sparsity).events(steps)
    assert (events[0], events[-1], events.step) == (first, last, 100)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(("begin", "end"), [(0.25, 0.75), (0, 1), (0.75, 1), (0, 0.25), (0.5, 0.5)])
def test_the_mean_density_is_that_of_the_closed_form(sparsity, begin, end):
    """A dense run of C steps has the compute of begin C + (end - begin) C ln(1/(1-S))/S + (1 - end) C/(1-S) steps."""
    pruning, steps = MagnitudePruning(sparsity, begin, end, every_steps=10), 20_000
    ramp = (end - begin) * math.log(1 / (1 - sparsity)) / sparsity
    exact = 1 / (begin + ramp + (1 - end) / (1 - sparsity))
    pieces = pruning.pruned(CONFIG, steps)
    n = sum(p.numel() for p in matrices(model()))
    ends = [*(step for step, _ in pieces[1:]), steps]
    mean = 1 - sum(count * (until - step) for (step, count), until in zip(pieces, ends, strict=True)) / steps / n
    assert mean == pytest.approx(exact, rel=0.005)
    # The window in compute: what is spent before its begin and its end, of all.
    assert pieces[0][0] / steps / mean == pytest.approx(begin, abs=0.002)
    assert 1 - (steps - pieces[-1][0]) * (1 - sparsity) / steps / mean == pytest.approx(end, abs=0.004)


def test_one_threshold_over_all_matrices_keeps_the_largest():
    built = model()
    before = torch.cat([p.detach().flatten() for p in matrices(built)])
    pruning = attached(built, sparsity=0.8, every_steps=5)
    events = pruning.events(100)
    order = before.abs().argsort(descending=True)
    for number, step in enumerate(events):
        pruning.before_update(step - 1, 100)  # no event
        pruning.before_update(step, 100)
        now = torch.cat([p.detach().flatten() for p in matrices(built)])
        keep = int(0.2 ** ((number + 1) / len(events)) * len(before))
        assert set(now.nonzero()[:, 0].tolist()) == set(order[:keep].tolist())
        assert torch.equal(now[order[:keep]], before[order[:keep]])
        pruning.before_update(step, 100)  # the update is tried again
        assert torch.equal(now, torch.cat([p.detach().flatten() for p in matrices(built)]))
    assert not (built.embedding.weight == 0).any() and (built.final_norm.weight == 1).all()
    density = pruning.row()["density_by_role"]
    for name, parameter in built.named_parameters():
        if (role := built.parameter_info()[name].role) in density and role == "head":
            assert density[role] == (parameter != 0).float().mean()
    assert int(0.2 * len(before)) == len(before) - pruning.pruned(CONFIG, 100)[-1][1] == keep


def test_a_pruned_weight_never_returns_and_has_no_gradient():
    built = model()
    pruning = attached(built, sparsity=0.5, every_steps=1)
    events = pruning.events(20)
    pruning.before_update(events[0], 20)
    dead = [p == 0 for p in matrices(built)]
    for p in built.parameters():
        p.grad = torch.full_like(p, math.inf)
    pruning.after_backward()
    assert all(((p.grad == 0) == zero).all() for p, zero in zip(matrices(built), dead, strict=True))
    assert built.embedding.weight.grad.isinf().all()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(100.0)  # what moments and decay do
    pruning.after_update(True)
    assert all(((p == 0) == zero).all() for p, zero in zip(matrices(built), dead, strict=True))
    for step in events:
        pruning.before_update(step, 20)
    now = [p == 0 for p in matrices(built)]
    assert all((then <= zero).all() for then, zero in zip(dead, now, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_of_equal_weights_the_first_are_kept(value):
    """Queries that start at zero are as many equal weights."""
    built = model(lambda name, p: torch.full_like(p, value))
    pruning = attached(built, sparsity=0.25, begin=0.5, end=0.5, every_steps=1)
    pruning.before_update(pruning.events(10)[0], 10)
    pruned = torch.cat([mask.flatten() for mask in pruning.tensors().values()])
    keep = int(0.75 * len(pruned))
    assert not pruned[:keep].any() and pruned[keep:].all()


def test_a_pruned_weight_stays_behind_living_zeros():
    built = model()
    with torch.no_grad():
        for number, parameter in enumerate(matrices(built)):
            parameter.fill_(number + 1.0)  # the first are the smallest
    pruning = attached(built, sparsity=0.5, every_steps=1)
    events = pruning.events(20)
    pruning.before_update(events[0], 20)
    first = torch.cat([mask.flatten() for mask in pruning.tensors().values()])
    with torch.no_grad():
        for parameter in matrices(built):
            parameter.zero_()
    pruning.before_update(events[1], 20)
    second = torch.cat([mask.flatten() for mask in pruning.tensors().values()])
    assert first.any() and (first <= second).all() and second.sum() > first.sum()


def test_two_of_four_are_left_in_every_group_in_the_end_and_no_fewer_before():
    built = model(lambda name, p: p * (1 if "mlp" in name else 0.1))
    pruning = attached(built, sparsity=0.5, every_steps=5, structure="2:4")
    events = pruning.events(100)
    for number, step in enumerate(events):
        pruning.before_update(step, 100)
        left = [(p != 0).view(-1, 4).sum(1) for p in matrices(built)]
        assert min(groups.min() for groups in left) >= 2
        total = sum(groups.sum().item() for groups in left)
        assert total == int(0.5 ** ((number + 1) / len(events)) * sum(p.numel() for p in matrices(built)))
    assert all((groups == 2).all() for groups in left)
    other = model(lambda name, p: p * (1 if "mlp" in name else 0.1))
    for here, there in zip(matrices(built), matrices(other), strict=True):
        largest = there.view(-1, 4).abs().argsort(1, descending=True)[:, :2]
        assert torch.equal(here.view(-1, 4).gather(1, largest), there.view(-1, 4).gather(1, largest))


@pytest.mark.parametrize("equal", [False, True])
def test_any_sharding_prunes_the_same_weights(equal):
    """Each of three threads has some rows of each matrix, and counts go over all of them."""
    change = (lambda name, p: torch.full_like(p, 0.5)) if equal else None
    whole = attached(model(change), sparsity=0.7, every_steps=5)
    parts, given = [attached(model(change), sparsity=0.7, every_steps=5) for _ in range(3)], [None] * 3
    barrier = threading.Barrier(3, timeout=60)

    def run(rank):
        def total(values):
            given[rank] = values
            barrier.wait()
            found = [sum(column) for column in zip(*given, strict=True)]
            barrier.wait()
            return found

        pruning = parts[rank]
        for name, parameter in pruning._parameters.items():
            rows = -(-len(parameter) // 3)
            part = parameter.detach()[rank * rows : (rank + 1) * rows].clone()
            pruning._parameters[name], pruning._pruned[name] = part, torch.zeros_like(part, dtype=torch.bool)
            pruning._places[name] += rank * rows * parameter.shape[1]
        pruning._sum = total
        for step in pruning.events(60):
            pruning.before_update(step, 60)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in whole.events(60):
        whole.before_update(step, 60)
    for name, mask in whole.tensors().items():
        assert torch.equal(torch.cat([pruning._pruned[name] for pruning in parts]), mask), name
    assert parts[0]._living == parts[2]._living == whole._living


def test_its_masks_go_on_and_are_not_where_weights_are_zero():
    built = model()
    pruning = attached(built, sparsity=0.5, every_steps=1)
    pruning.before_update(pruning.events(20)[0], 20)
    saved = pruning.tensors()
    with torch.no_grad():
        built.blocks[0].attention.q.weight.zero_()  # as muP begins
    again = attached(built, sparsity=0.5, every_steps=1)
    again.restore_tensors(saved)
    assert all(torch.equal(mask, saved[name]) for name, mask in again.tensors().items())
    assert again.row() == pruning.row() and not saved["blocks.0.attention.q.weight"].all()
    with pytest.raises(KeyError):
        again.restore_tensors({})
    with pytest.raises(ValueError, match="mask of blocks.0.attention.q.weight"):
        again.restore_tensors({name: mask[:1] for name, mask in saved.items()})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1}, "sparsity must be in"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": 0.6, "structure": "2:4"}, "sparsity must be at most 0.5 with structure=2:4"),
        ({"sparsity": 0.5, "structure": "1:4"}, "structure must be one of none, 2:4"),
        ({"sparsity": 0.5, "begin": 0.8}, "begin must be from 0 to end=0.75"),
        ({"sparsity": 0.5, "every_steps": 0}, "every_steps must be a whole number"),
    ],
)
def test_what_cannot_be_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        MagnitudePruning(**options)


@pytest.mark.parametrize(
    ("window", "steps"),
    [({}, 1), ({}, 50), ({}, 150), ({}, 250), ({"begin": 0.0, "end": 0.25}, 100), ({"begin": 0.7}, 400)],
)
def test_a_run_that_is_too_short_for_the_events_is_refused(window, steps):
    """It would begin at once, or have one event."""
    with pytest.raises(ConfigError, match="every_steps=100 is too long for a run of"):
        MagnitudePruning(0.5, **window).check_steps(steps)


def test_a_run_that_is_long_enough_is_not_refused():
    MagnitudePruning(0.5).check_steps(1000)
    MagnitudePruning(0.5, begin=0.5, end=0.5).check_steps(1)
    MagnitudePruning(0.5, begin=0.0).check_steps(1000)
