"""A compiled run: blocks share their code, hooks act between them, and the losses are those of the eager run."""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from scaling_testbed.config.sections import ComputeConfig
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.compilation import choose_compile, compile_blocks
from scaling_testbed.processes.device import configure_torch
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.placement import parallelize
from scaling_testbed.processes.world import World
from scaling_testbed.training import parts as building
from scaling_testbed.training import run as trainer
from scaling_testbed.training.run import train
from tests.training.conftest import StopAt, metrics

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces and differentiates as always, but no compiler of C++ works. Returns Dynamo's counters."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="aot_eager", **options))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


KINDS = {
    "single": (),
    "bf16": ("compute.precision=bf16",),
    "recomputed": ("parallelism.activation_checkpointing=2", "batch.micro_batch_sequences=4"),
    "measured": ("diagnostics.every_steps=2",),
    "ddp": ("parallelism=ddp",),
    "fsdp": ("parallelism=fsdp", "parallelism.activation_checkpointing=1"),
    "together": ("model.qkv_impl=together", "model.n_kv_heads=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_run_has_the_losses_of_an_eager_one_by_one_code_for_all_blocks(trained, traced, kind):
    """The last batch of an evaluation has fewer sequences, and needs no code of its own."""
    options = "model.n_layers=3", "evaluation.rows=5", *KINDS[kind]
    eager, plain = trained(*options, runs="eager")
    assert traced["stats"] == Counter() and eager["compiled"] is False
    compiled, folder = trained(*options, "compute.compile=true", runs="compiled")
    assert compiled["compiled"] is True and compiled["run_id"] == eager["run_id"]
    assert traced["stats"]["unique_graphs"] == 2  # of training, and of evaluation
    near = {"rel": 1e-3 if kind == "bf16" else 1e-5}
    for line, other in zip(metrics(plain), metrics(folder), strict=True):
        assert line.keys() == other.keys()
        for key in {"val_loss", "train_loss", "grad_norm"} & line.keys():
            assert other[key] == pytest.approx(line[key], **near), (line["step"], key)


@pytest.mark.slow
def test_ddp_has_the_gradients_of_a_block_before_those_of_earlier_blocks_are_computed(tiny, traced):
    run, _ = tiny("parallelism=ddp", "model.n_layers=3", "compute.compile=true")
    with Processes(World(), run.parallelism) as processes:
        processes.connect(CPU)
        model = Transformer(run.model.resolved(64), run.parametrization)
        loss = dataclasses.replace(run.loss, impl="chunked")
        placed = parallelize(LossModel(model, loss), run.parallelism, CPU, "fp32", 0)
        compile_blocks(model)
        ready = []
        for layer, block in enumerate(model.blocks):
            for parameter in block.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _, layer=layer: ready.append(layer))
        terms = placed.forward(torch.randint(0, 64, (2, 9)))
        waiting, seen = [terms.loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [after for after, _ in node.next_functions]
        assert sum("CompiledFunction" in node.name() for node in seen) == 3
        terms.loss.backward()
        assert ready == sorted(ready, reverse=True) and set(ready) == {0, 1, 2}


@pytest.mark.slow
def test_a_block_that_cannot_be_compiled_is_one_line(tiny, traced, monkeypatch):
    from scaling_testbed.model.layers import MLP

    real = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: torch._dynamo.graph_break() or real(self, x))
    run, folder = tiny("compute.compile=true")
    with pytest.raises(UserError, match=r"^compute.compile=true cannot compile this model: .*; set it to false$"):
        train(run, quiet=True)
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


def test_a_run_that_goes_on_without_compiling_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(building, "compile_blocks", lambda model: None)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(9))
        assert train(tiny("compute.compile=true")[0])["status"] == "preempted"
    assert "from here on" not in "".join(capsys.readouterr())
    row = train(tiny("compute.compile=auto")[0])
    assert "the model is not compiled from here on, and was compiled before" in "".join(capsys.readouterr())
    assert row["compiled"] is False and row["restarts"] == 1


@pytest.mark.parametrize(("deterministic", "variable"), [(True, None), (False, None), (False, "1")])
def test_a_deterministic_run_has_the_compiler_choose_without_measuring(monkeypatch, deterministic, variable):
    """And no later run in its process inherits it."""
    import torch._inductor.config as inductor

    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    if variable:
        monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", variable)
    configure_torch(ComputeConfig(deterministic=deterministic))
    try:
        with inductor.patch(deterministic=not deterministic):
            compile_blocks(SimpleNamespace(blocks=[]))
            assert inductor.deterministic is (deterministic or bool(variable))
    finally:
        configure_torch(ComputeConfig())


def test_compile_is_true_false_or_auto_which_is_false_on_every_device_until_it_is_measured(tiny):
    for typed, value in (("auto", "auto"), ("true", True), ("false", False)):
        assert tiny(f"compute.compile={typed}")[0].compute.compile == value
    for device in ("cpu", "cuda"):
        assert [choose_compile(ComputeConfig(compile=way), torch.device(device)) for way in ("auto", True, False)] == [
            False,
            True,
            False,
        ]
    with pytest.raises(ConfigError, match="compile must be true, false or auto; got 'yes'"):
        tiny("compute.compile=yes")


def test_sequences_that_fill_a_batch_up_do_not_count(tiny):
    run, _ = tiny()
    model = Transformer(run.model.resolved(64), run.parametrization)
    model.init_weights(0)
    loss = LossModel(model, dataclasses.replace(run.loss, impl="chunked"))
    tokens = torch.randint(0, 64, (3, 17))
    tokens[2, 9:] = torch.randint(0, 64, (8,))
    alone, filled = loss(tokens), loss(tokens, rows=8)
    assert filled.n_tokens == alone.n_tokens == 48
    assert filled.ce.item() == pytest.approx(alone.ce.item(), rel=1e-6)
