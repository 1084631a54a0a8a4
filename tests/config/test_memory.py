"""The estimate of memory against what torch really holds."""

import pytest
import torch

from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import activation_bytes_per_token, estimate_memory, rows_of_evaluation
from scaling_testbed.config.run import interventions_of
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.interventions.base import Context
from scaling_testbed.learning.optimizers import OPTIMIZERS, state_bytes
from scaling_testbed.model.counting import count_params
from scaling_testbed.model.transformer import Transformer


def kept_by_autograd(model, sequences, length, *documents):
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
        model(torch.randint(0, 257, (sequences, length)), *(x[:sequences] for x in documents))
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
        ["model.attention_normaliser=relu2"],
        ["model.attention_normaliser=relu2", "model.qk_norm=none", "model.n_heads=2"],
        ["model.attention_normaliser=relu2", "model.attention_softcap=5"],
        ["model.attention_impl=reference"],
        ["model.attention_window=8", "model.attention_softcap=5"],
        ["model.qk_norm=none", "model.kappa=3"],
        ["model.residual=peri"],
        ["model.qkv_impl=together"],
        ["model.qkv_impl=together", "model.qk_norm=none"],
        ["model.qkv_impl=together", "model.qk_norm=none", "model.attention_impl=reference"],
        ["model.qkv_impl=together", "model.attention_impl=reference"],
        ["model.qkv_impl=together", "model.d_head=512"],  # attention does not widen it
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
    assert activation_bytes_per_token(config, precision, 64, "cpu") == pytest.approx(per_token, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", [[], ["model.attention_impl=reference"], ["model.d_head=512"]], ids=str)
def test_tables_and_mask_of_documents_are_counted_once_for_all_layers(overrides, precision):
    run = compose(["model=nano_m", "batch.document_masking=true", "batch.sequence_length=64", *overrides])
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    begins_BT = torch.zeros(6, 64, dtype=torch.int64)
    begins_BT[:, 9:] = 9
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        few, many = (kept_by_autograd(model, rows, 64, begins_BT) for rows in (2, 6))
    found = estimate_memory(run, config, count_params(config).n_params, precision, 1, "cpu").activations
    assert found / (32 * 64) == pytest.approx((many - few) / (4 * 64), rel=0.05)
    plain = compose(["model=nano_m", "batch.sequence_length=64", *overrides])
    assert found > estimate_memory(plain, config, count_params(config).n_params, precision, 1, "cpu").activations


@pytest.mark.fault(
    "A17", "What a new optimizer or normaliser says of itself decides its memory, its S and its padding."
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_what_torch_allocates(optimizer):
    run = compose(["model=nano_s", "batch.micro_batch_sequences=4", f"optimizer={optimizer}"])
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    model.init_weights(0)
    optimizer = run.optimizer.build(model)
    model(torch.randint(0, 257, (1, 8))).sum().backward()
    model.head_weight_VD.grad = torch.zeros_like(model.head_weight_VD)
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    found = estimate_memory(run, config, count_params(config).n_params, "fp32")
    assert found.states == sum(x.nbytes for x in tensors) and found.optimizer == state_bytes(optimizer)
    assert found.activations == 4 * 128 * activation_bytes_per_token(config, "fp32", 128)
    assert found.logits == 4 * 128 * 257 * 4  # the whole of it is less than the buffer


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_masks_of_pruning_are_what_torch_allocates(mlp):
    words = ["model=nano_s", f"model.mlp={mlp}", "batch.sequences=8", "+interventions.magnitude_pruning.sparsity=0.5"]

    def estimate(*further):
        run = compose([*words, *further])
        config = run.model.resolved(257)
        return run, config, estimate_memory(run, config, count_params(config).n_params, "fp32", n_gpus=8)

    run, config, found = estimate()
    (pruning,) = interventions_of(run).values()
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    pruning.attach(Context(model=model, optimizer=None, sum=list, largest=list))
    assert found.interventions == sum(mask.nbytes for mask in pruning.tensors().values()) > 0
    assert found.states == found.parameters + found.gradients + found.optimizer + found.interventions
    assert estimate("parallelism=ddp")[2].interventions == found.interventions
    assert estimate("parallelism=fsdp")[2].interventions == found.interventions / 8
    assert estimate("~interventions.magnitude_pruning")[2].interventions == 0


@pytest.mark.parametrize("changes", [["linear=plain"], ["linear=sigma_reparam"], ["qkv_impl=together"]], ids=str)
def test_weights_that_are_made_anew_are_kept_until_the_backward_pass(changes):
    run = compose(["model=nano_m", "model.d_model=128", *(f"model.{change}" for change in changes)])
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    constant = kept_by_autograd(model, 1, 2) - 2 * activation_bytes_per_token(config, "fp32", 2)
    head = 4 * 257 * 128 * (config.linear == "sigma_reparam")  # which the loss multiplies with
    found = estimate_memory(run, config, count_params(config).n_params, "fp32").working_copies
    assert found - head == pytest.approx(constant, rel=0.05, abs=1e4)


PROXY_5B, OPENLM_7B = (
    ["model=proxy_5b"],
    ["model=openlm_7b", "experiment=over_training", "batch.micro_batch_sequences=null"],
)


@pytest.mark.parametrize("overrides", [PROXY_5B, OPENLM_7B], ids=["proxy_5b", "openlm_7b"])
@pytest.mark.parametrize("n_gpus", [1, 8, 64])
def test_states_of_the_largest_models_are_what_their_shards_take(overrides, n_gpus):
    """Of the first rank, which has the larger share where rows do not divide."""
    run = compose([*overrides, "parallelism=fsdp", "batch.sequences=64"])
    config = run.model.resolved(50432)
    model = Transformer(config, run.parametrization, device="meta")
    shards = [-(-p.shape[0] // n_gpus) * p[0].numel() * p.element_size() for p in model.parameters()]
    found = estimate_memory(run, config, count_params(config).n_params, "fp32", n_gpus)
    assert found.parameters == found.gradients == pytest.approx(sum(shards), rel=1e-3)
    assert found.optimizer == 2 * found.parameters
    assert found.total > found.states


def test_sharding_and_recomputation_lower_what_they_should_and_nothing_else():
    base = ["model=openlm_7b", "batch.sequences=64", "batch.sequence_length=2048"]

    def estimate(*overrides, n_gpus=8):
        run = compose([*base, *overrides])
        model = run.model.resolved(50432)
        return estimate_memory(run, model, count_params(model).n_params, "bf16", n_gpus)

    copied, sharded = estimate("parallelism=ddp"), estimate("parallelism=fsdp")
    assert copied.states == pytest.approx(8 * sharded.states) and copied.activations == sharded.activations
    assert copied == estimate("parallelism=ddp", n_gpus=8) and sharded.working_copies < copied.working_copies
    pairs = estimate("parallelism=fsdp", "parallelism.shard_size=2")
    assert pairs.states == pytest.approx(4 * sharded.states)
    micro = estimate("parallelism=fsdp", "batch.micro_batch_sequences=2")
    assert micro.gradients == copied.gradients and micro.activations == sharded.activations // 4
    every = estimate("parallelism=fsdp", "parallelism.activation_checkpointing=1")
    other = estimate("parallelism=fsdp", "parallelism.activation_checkpointing=2")
    assert every.activations < other.activations < sharded.activations and every.states == sharded.states
    stream = 8 * 2048 * 4 * 4096  # of eight sequences, one tensor in fp32
    assert every.activations > 32 * stream


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_activations_with_recomputation_are_what_autograd_keeps(every, narrow):
    """But for the one block that is whole while it is computed again, which autograd does not hold at this moment."""
    precision, words = "fp32", []
    if narrow:
        precision, words = "bf16", ["compute.precision=bf16", "compute.residual_dtype=bf16"]
    run = compose(["model=nano_m", "model.n_layers=4", f"parallelism.activation_checkpointing={every}", *words])
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=torch.device("cpu"))
    model.recompute_every, model.narrow_residual = every, narrow
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        per_token = (kept_by_autograd(model, 6, 64) - kept_by_autograd(model, 2, 64)) / (4 * 64)
    whole = activation_bytes_per_token(config, precision, run.batch.sequence_length, "cpu")
    block = (whole - 4 * config.d_model) // 4
    memory = estimate_memory(run, config, count_params(config).n_params, precision, device="cpu")
    found = memory.activations / run.batch.tokens
    assert found - block == pytest.approx(per_token, rel=0.06)


@pytest.mark.parametrize(
    ("words", "device", "rows"),
    [
        ([], "cuda", 32),
        (["evaluation.rows=5"], "cuda", 5),
        (["evaluation.rows=auto"], "cuda", 32),  # two blocks, of which an evaluation needs one
        (["evaluation.rows=auto", "model.n_layers=8"], "cuda", 128),
        (["evaluation.rows=auto", "model.n_layers=8"], "cpu", 64),  # 8,192 tokens
        (["evaluation.rows=auto", "batch.sequences=128"], "cpu", 64),
        (["evaluation.rows=auto", "model.n_layers=8", "batch.sequence_length=2048"], "cuda", 128),
        # A mask of T^2 numbers for each sequence, which the layers share, is as large in an evaluation.
        (
            ["evaluation.rows=auto", "model.n_layers=8", "batch.sequence_length=2048", "batch.document_masking=true"],
            "cuda",
            64,
        ),
        (["evaluation.rows=auto", "model.n_layers=0"], "cuda", 32),
        (["evaluation.rows=auto", "model.n_layers=8", "parallelism.activation_checkpointing=1"], "cuda", 32),
    ],
)
def test_an_evaluation_takes_the_sequences_that_fit_the_memory_of_training(words, device, rows):
    run = compose(["model=nano_s", *words])
    assert rows_of_evaluation(run, run.model.resolved(257), "fp32", device, run.batch.sequences) == rows


def test_a_word_for_the_sequences_of_an_evaluation_is_refused():
    with pytest.raises(ConfigError, match="rows must be a number, auto or null; got 'all'"):
        compose(["model=nano_s", "evaluation.rows=all"])
