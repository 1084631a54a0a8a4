"""The estimate of memory against what torch really holds."""

import pytest
import torch

from scaling_testbed.config.compose import compose
from scaling_testbed.learning.optimizers import build_optimizer
from scaling_testbed.model.counting import count_params
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.running.memory import activation_bytes_per_token, estimate_memory


def kept_by_autograd(model, sequences, length):
    """Bytes of the distinct storages that a forward pass saves, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(x)  # a freed storage's address could be used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randint(0, 257, (sequences, length)))
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.qk_norm=none"],
        ["model.mlp=swiglu"],
        ["model.n_layers=4", "model.d_model=64"],
        ["model.d_ff=512"],
        ["model.d_head=64"],
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)
def test_activations_are_what_autograd_keeps(overrides, precision):
    run = compose(["model=nano_m", *overrides])
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        few, many = kept_by_autograd(model, 2, 64), kept_by_autograd(model, 6, 64)
    per_token = (many - few) / (4 * 64)  # without the bf16 copies of the weights, which do not grow
    assert activation_bytes_per_token(config, precision) == pytest.approx(per_token, rel=0.05)


def test_states_are_what_torch_allocates():
    run = compose(["model=nano_s", "batch.micro_batch_sequences=4"])
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    model.init_weights(0)
    optimizer = build_optimizer(run.optimizer, model)
    model(torch.randint(0, 257, (1, 8))).sum().backward()
    model.head_weight_VD.grad = torch.zeros_like(model.head_weight_VD)
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    found = estimate_memory(run, config, count_params(config).n_params, "fp32")
    assert found.states == sum(x.nbytes for x in tensors)
    assert found.activations == 4 * 128 * activation_bytes_per_token(config, "fp32")
    assert found.logits == 4 * 128 * 257 * 4  # the whole of it is less than the buffer
