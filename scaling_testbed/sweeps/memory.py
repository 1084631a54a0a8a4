"""How much memory a run will take on each device, before it is run; free of torch.

An estimate. With N parameters over s shards (1 unless parallelism=fsdp), in bytes:

    parameters      4 N / s, fp32
    gradients       4 N / s, fp32; 4 N for fsdp with several micro-batches, which adds them up before it shards them
    optimizer       over s shards what the optimizer says it keeps of a weight of each role: 8 N / s for AdamW
    working copies  single and ddp: 2 N in bf16, the matrices that autocast holds until their backward pass; in fp32
                    4 bytes for each weight that its linear layer makes another matrix of. fsdp: what
                    is whole for a while: embedding, head and gains with their gradients (8 bytes each), two blocks
                    (one computes, one is under way) in the type of the products, and one block's gradients there and
                    in fp32
    activations     what autograd keeps of one micro-batch, counted tensor by tensor, with qk-norm on the reference
                    path; of a block that is computed again only its input, and one such block whole while that happens
    logits          the loss head's buffer

The first three are exact but for the rounding of shards (within 0.1%; a test compares), activations are within 5% of
what autograd keeps on a CPU (another test). Working copies and logits are reckoned and measured nowhere, and what an
allocator and NCCL add is not in it.
"""

from dataclasses import dataclass

from scaling_testbed.config.run import RunConfig
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import block_matrices, weights_by_role
from scaling_testbed.model.parts import ATTENTION_IMPLS, LINEARS, MLPS, NORMALISERS, NORMS, RESIDUALS, choose_impl

# Bytes per parameter: fp32 weights, fp32 gradients; a copy in bf16.
WEIGHTS, GRADIENTS, BF16_COPY = 4, 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for; see the top of this file."""

    parameters: int
    gradients: int
    optimizer: int
    working_copies: int
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """What is there between two steps, gradients included."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.working_copies + self.activations + self.logits


def estimate_memory(
    run: RunConfig, model: ModelConfig, n_params: int, precision: str = "bf16", n_gpus: int = 1
) -> Memory:
    """Memory on each of `n_gpus` in a step of `run`, as its parallelism says, with the resolved `model` of `n_params`
    parameters, in bf16 or fp32."""
    parallelism = run.parallelism
    sharded = parallelism.is_sharded
    shards = (parallelism.shard_size or n_gpus) if sharded else 1
    here = -(-run.batch.sequences // n_gpus)
    rows = min(run.batch.micro_batch_sequences or here, here)
    tokens = rows * run.batch.sequence_length
    kept_whole = sharded and rows < here
    return Memory(
        parameters=-(-n_params * WEIGHTS // shards),
        gradients=n_params * GRADIENTS if kept_whole else -(-n_params * GRADIENTS // shards),
        optimizer=-(-_optimizer_bytes(run, model) // shards),
        working_copies=_working_copies(model, n_params, precision, sharded),
        activations=tokens * _kept_per_token(run, model, precision),
        logits=run.loss.logits_bytes(tokens, model.known_vocab_size),
    )


def _optimizer_bytes(run: RunConfig, model: ModelConfig) -> int:
    return sum(count * run.optimizer.bytes_per_weight(role) for role, count in weights_by_role(model).items())


def _working_copies(model: ModelConfig, n_params: int, precision: str, sharded: bool) -> int:
    if not sharded and precision == "bf16":
        return n_params * BF16_COPY
    if not sharded:
        head = 0 if model.tied_head else model.known_vocab_size * model.d_model
        made_anew = model.n_layers * block_matrices(model) + head if LINEARS[model.linear].makes_weight_anew else 0
        return made_anew * WEIGHTS
    block = block_matrices(model) if model.n_layers else 0
    outside = n_params - model.n_layers * block
    product = BF16_COPY if precision == "bf16" else WEIGHTS
    return outside * (WEIGHTS + GRADIENTS) + block * (2 * product + product + GRADIENTS)


def _kept_per_token(run: RunConfig, model: ModelConfig, precision: str) -> int:
    """Bytes of activations a token, with the input of each recomputed block in fp32 in place of all it would keep."""
    everything = activation_bytes_per_token(model, precision, run.batch.sequence_length)
    recompute_every, stream = run.parallelism.activation_checkpointing, 4 * model.d_model
    if recompute_every is None or not model.n_layers:
        return everything
    block = (everything - stream) // model.n_layers
    recomputed = -(-model.n_layers // recompute_every)
    return everything - recomputed * (block - stream) + block


def activation_bytes_per_token(model: ModelConfig, precision: str, sequence_length: int) -> int:
    """What autograd keeps for a token, from the facts in model.parts. With D width, a = heads x d_head, F the MLP's
    width, a block keeps, in the type of the products unless said otherwise:

        D for the input of each branch, and in fp32 what each norm's backward pass needs
        a for queries and a for keys in fp32, where they are normed
        what the path of attention keeps: 5 a by PyTorch's; by the reference 4 a, of them 3 a in fp32, and in fp32 the
        scores that the normaliser and a softcap keep
        2 F, of a gated MLP 4 F

    and after the blocks the final norm's input in fp32. The path is the named one, or what `auto` takes on a GPU."""
    path = ATTENTION_IMPLS[choose_impl("attention_impl", model)]
    norm, layout, mlp = NORMS[model.norm], RESIDUALS[model.residual], MLPS[model.mlp]
    a = model.n_heads * model.head_width
    scores = 0
    if path.keeps_scores:
        n_scores = NORMALISERS[model.attention_normaliser].kept_scores + (model.attention_softcap is not None)
        scores = n_scores * model.n_heads * sequence_length
    normed = 2 * layout.norms_per_branch * norm.kept * model.d_model + 2 * model.query_key_norm.kept * a
    wide = normed + path.kept_wide * a + scores
    products = 2 * model.d_model + path.kept * a + mlp.kept_widths * model.ff_width
    in_product = BF16_COPY if precision == "bf16" else WEIGHTS
    return model.n_layers * (4 * wide + in_product * products) + 4 * model.d_model
