"""How much memory a run will take on each device, before it is run; free of torch.

An estimate. With N parameters over s shards (1 unless parallelism=fsdp), in bytes:

    parameters      4 N / s, fp32
    gradients       4 N / s, fp32; 4 N for fsdp with several micro-batches, which adds them up before it shards them
    optimizer       over s shards what the optimizer says it keeps of a weight of each role: 8 N / s for AdamW
    working copies  single and ddp: 2 N in bf16, the matrices that autocast holds until their backward pass; in fp32
                    4 bytes for each weight that sigma_reparam makes another matrix of. fsdp: what
                    is whole for a while: embedding, head and gains with their gradients (8 bytes each), two blocks
                    (one computes, one is under way) in the type of the products, and one block's gradients there and
                    in fp32
    activations     what autograd keeps of one micro-batch on the reference path, counted tensor by tensor; of a block
                    that is computed again only its input, and one such block whole while that happens
    logits          the loss head's buffer

The first three are exact but for the rounding of shards (within 0.1%; a test compares), activations are within 5% of
what autograd keeps on a CPU (another test). Working copies and logits are reckoned and measured nowhere, and what an
allocator and NCCL add is not in it.
"""

from dataclasses import dataclass

from scaling_testbed.config.run import RunConfig
from scaling_testbed.model.config import GATED_MLPS, ModelConfig
from scaling_testbed.model.counting import block_matrices, weights_by_role

# Bytes per parameter: fp32 weights, fp32 gradients; a copy in bf16.
WEIGHTS, GRADIENTS, BF16_COPY = 4, 4, 2
LOGITS_BYTES = 2**30  # the chunked head's buffer on a GPU, see loss.chunk_mib


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
    sharded = parallelism.kind == "fsdp"
    shards = (parallelism.shard_size or n_gpus) if sharded else 1
    here = -(-run.batch.sequences // n_gpus)
    rows = min(run.batch.micro_batch_sequences or here, here)
    tokens = rows * run.batch.sequence_length
    all_logits = tokens * model.vocab_size * 4
    buffer = run.loss.chunk_mib * 2**20 if run.loss.chunk_mib else LOGITS_BYTES
    kept_whole = sharded and rows < here
    return Memory(
        parameters=-(-n_params * WEIGHTS // shards),
        gradients=n_params * GRADIENTS if kept_whole else -(-n_params * GRADIENTS // shards),
        optimizer=-(-_optimizer_bytes(run, model) // shards),
        working_copies=_working_copies(model, n_params, precision, sharded),
        activations=tokens * _kept_per_token(run, model, precision),
        # The reference holds logits, their softmax and their gradient.
        logits=3 * all_logits if run.loss.impl == "reference" else min(buffer, all_logits),
    )


def _optimizer_bytes(run: RunConfig, model: ModelConfig) -> int:
    return sum(count * run.optimizer.bytes_per_weight(role) for role, count in weights_by_role(model).items())


def _working_copies(model: ModelConfig, n_params: int, precision: str, sharded: bool) -> int:
    if not sharded and precision == "bf16":
        return n_params * BF16_COPY
    if not sharded:
        head = 0 if model.tied_head else model.vocab_size * model.d_model
        made_anew = model.n_layers * block_matrices(model) + head if model.linear == "sigma_reparam" else 0
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
    """What autograd keeps for a token. With D width, a = heads x d_head, F the MLP's width, a block keeps
    4 D (two norms' inputs and outputs), 5 a (q, k, v, their attention and its product), 2 a more with qk-norm, and 2 F
    (4 F gated); in bf16 the norms' inputs and what the qk-norm reads and gives stay fp32. After the blocks: the final
    norm's input. Pointwise attention keeps two scores in fp32 for each head and position, one a less, and q, k and v
    in fp32."""
    D, F = model.d_model, model.d_ff
    a = model.n_heads * model.d_head
    a_normed = 0 if model.qk_norm == "none" else 2 * a
    pointwise = model.attention_normaliser == "relu2"
    mlp = (4 if model.mlp in GATED_MLPS else 2) * F
    elements = 4 * D + (4 if pointwise else 5) * a + a_normed + mlp
    scores = 2 * model.n_heads * sequence_length if pointwise else 0
    if precision == "fp32":
        return model.n_layers * 4 * (elements + scores) + 4 * D
    stay_fp32 = 2 * D + a_normed + (3 * a if pointwise else 0)
    return model.n_layers * (2 * elements + 2 * stay_fp32 + 4 * scores) + 4 * D
