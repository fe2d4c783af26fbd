"""Peak memory of a stretch of a model, its adapters and one micro-batch; docs/method.md, Memory.

Pure arithmetic on the sizes of `sizes.py`: knows no torch, no model family, no device and no plan.
What a frozen block keeps for its backward pass is told by `ModelShape.kept`, which
`edge_sdk/model/shape.py` observes; without it, sizes of the linear layers stand in. Operations are
`flops.py`; both are to be had from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from profiler.estimate.sizes import (
    FRAGMENTATION,
    TAIL_TARGETS,
    BlockRanks,
    Kept,
    Known,
    Linear,
    ModelShape,
    Work,
    block_ranks,
    lowest_block,
    targets_at_once,
)

# Adapters, their gradients and Adam's moments are float32 whatever the base is.
ADAPTER_BYTES = 4
MOMENTS = {"adamw": 2, "sgd": 0}
# Logits of some targets, their gradient, an eighth of both three times, and what BLAS takes or a
# soft cap keeps: 9.5 without, 14 in a process that has done nothing yet (benchmarks/targets.py).
LOGITS_BYTES = 14
# A classifier's: logits, softmax, gradient.
CLASSES_BYTES = 12
# Model code, optimizer and PEFT layers that are loaded on first use, and BLAS's buffers: 14 to
# 18 MiB over the import floor on Linux x86-64, before any large tensor (benchmarks/memory.py).
RUNTIME_BYTES = 16 * 2**20
# What onnxruntime's arena holds after both passes of a block, as a multiple of what torch keeps of
# it, by how it computes the block again, and for every logit of a tail: 2.2 to 4 and 5.4 floats
# where measured (benchmarks/memory.py, own_gradients.py).
ARENA_FACTORS, ARENA_LOGIT_BYTES = {"block": 2.7, "own-block": 3.4}, 22
# glibc never takes anything larger from its heap, where fragments are left.
MAX_HEAP_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Peak memory by what it is for, in bytes."""

    base: int
    """Frozen weights. All pages count, also of embedding rows that were not looked up yet, whether
    they are those of a file or hold a weight with the residual inside, in its place."""
    adapters: int
    gradients: int
    optimizer: int
    residual: int
    activations: int
    """Kept between forward and backward pass."""
    workspace: int
    """What comes and goes: gradients of activations, logits, code loaded on first use."""
    wire: int
    overhead: int
    """The process before any of this, as given."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum([getattr(self, name) for name in _PARTS])


class _Block(NamedTuple):
    """What the adapters of one block add; numbers where it says nothing else."""

    trained: int
    residual: int
    largest: int
    """Frozen numbers of the largest weight that has a residual."""
    kept: int
    """Bytes between forward and backward pass."""
    freed: int
    """Bytes that come and go beside the weights: for adapters, then for residuals."""
    freed_residual: int


_PARTS = tuple(field.name for field in fields(MemoryEstimate))


def estimate_memory(
    model: ModelShape, work: Work, overhead_bytes: int = 0, known: Known | None = None
) -> MemoryEstimate:
    """Return the peak memory of a process that does *work*, again and again.

    Args:
        model: Sizes of the model.
        work: The stretch, its adapters and the micro-batch.
        overhead_bytes: Memory of the process once its libraries are loaded.
        known: What was found of blocks of this model before, and what is found now; None: nothing.
    """
    ranks = block_ranks(model, work)
    blocks = _blocks(model, work, ranks, {} if known is None else known)
    reached = blocks[lowest_block(work, ranks) - work.first :]
    trained = sum([block.trained for block in blocks])
    head = model.head_params if work.trains_head and work.has_tail else 0
    activations = _activations(model, work, reached)
    between = _between(model, work, activations)
    residual = sum([block.residual for block in blocks])
    return MemoryEstimate(
        base=_base_bytes(model, work),
        adapters=ADAPTER_BYTES * trained,
        gradients=ADAPTER_BYTES * (trained + head),
        optimizer=ADAPTER_BYTES * _moments(work.optimizer) * (trained + head),
        residual=ADAPTER_BYTES * residual + _folding_bytes(work, blocks),
        activations=between,
        workspace=_workspace(model, work, reached, max(0, activations - between)),
        wire=_wire(model, work),
        overhead=overhead_bytes,
    )


def _blocks(
    model: ModelShape, work: Work, blocks: Sequence[BlockRanks], known: Known
) -> list[_Block]:
    """Return what the adapters of each block add; equal ones are looked at once."""
    residual = work.residual_rank, work.residual_used, work.folds_residual
    about = ("memory", work.tokens, work.compute_bytes, work.has_lora_dropout, *residual)
    found = []
    for ranks in blocks:
        key = ranks, about
        block = known.get(key)
        if block is None:
            block = known[key] = _block(model, work, ranks)
        found.append(block)
    return found


def _block(model: ModelShape, work: Work, ranks: BlockRanks) -> _Block:
    pairs = list(zip(model.linears, ranks, strict=True))
    adapted = [(linear, rank) for linear, rank in pairs if rank]
    has_any = work.residual_rank > 0
    beside = [linear for linear, rank in pairs if has_any and rank is not None]
    width = work.tokens * work.compute_bytes
    return _Block(
        trained=sum(rank * linear.num_factors for linear, rank in adapted),
        residual=_residual_params(work, beside),
        largest=max((linear.num_weights for linear in beside), default=0),
        kept=_kept_adapters(adapted, work),
        freed=sum(_freed_beside(linear, width) for linear, _ in adapted),
        freed_residual=sum(_freed_beside(linear, width) for linear in beside),
    )


def _between(model: ModelShape, work: Work, activations: int) -> int:
    """Return what is kept while the device waits for its gradient."""
    if work.recompute == "none":
        return work.in_flight * activations
    num_kept = 2 if work.recompute == "slice" else work.stop - work.first + 1
    return work.in_flight * num_kept * hidden_bytes(model, work.micro_batch, work.length, 4)


def adapter_bytes(
    linear: Linear,
    rank: int,
    tokens: int,
    compute_bytes: int = 4,
    optimizer: str = "adamw",
    fragmentation: float = FRAGMENTATION,
) -> int:
    """Return what an adapter adds to a device's memory; the sum over a block is what they all add.

    Args:
        linear: The adapted weight.
        rank: Rank of the adapter; 0 costs nothing.
        tokens: Tokens of a micro-batch.
        compute_bytes: Bytes of an activation.
        optimizer: `adamw` or `sgd`.
        fragmentation: As in `Work`.
    """
    if rank == 0:
        return 0
    trained = rank * linear.num_factors
    tokens *= linear.num_active
    copies = 2 + _moments(optimizer)  # itself and its gradient
    kept = tokens * rank  # A x, for the gradient of B
    if compute_bytes != 4:  # autocast copies the factors, and the input for every adapter
        kept += tokens * linear.num_inputs + (trained if tokens else 0)
    elif not linear.input_is_kept:
        kept += tokens * linear.num_inputs // linear.num_sharing
    fragments = fragmentation * _freed_beside(linear, tokens * compute_bytes)
    return ADAPTER_BYTES * copies * trained + compute_bytes * kept + round(fragments)


def hidden_bytes(model: ModelShape, micro_batch: int, length: int, codec_bytes: float) -> int:
    """Return the bytes of one hidden state, or of its gradient, on the wire."""
    return math.ceil(micro_batch * length * model.hidden_size * codec_bytes)


def _moments(optimizer: str) -> int:
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(MOMENTS)}")
    return MOMENTS[optimizer]


def _base_bytes(model: ModelShape, work: Work) -> int:
    num_blocks = work.stop - work.first
    params = model.block_params * num_blocks
    if work.has_front or (work.has_tail and model.tail_needs_front):
        params += model.front_params
    else:
        params += model.late_params
    params += model.tail_params if work.has_tail else 0
    if work.linear_bytes is None:
        return work.base_bytes * params
    packed = num_blocks * sum(linear.num_weights for linear in model.linears)
    return work.base_bytes * (params - packed) + round(work.linear_bytes * packed)


def _residual_params(work: Work, linears: Sequence[Linear]) -> int:
    """Return the numbers of a block's frozen residual, beside these linear layers."""
    is_cut = 0 < work.residual_used < work.residual_rank
    cut = work.residual_used if is_cut else 0
    return sum(
        (min(work.residual_rank, linear.most_rank) + min(cut, linear.most_rank))
        * linear.num_factors
        for linear in linears
    )


def _folding_bytes(work: Work, blocks: Sequence[_Block]) -> int:
    """Return what making weights anew takes beside them: the largest as it was at first."""
    if not work.folds_residual:
        return 0
    return work.base_bytes * max((block.largest for block in blocks), default=0)


def _activations(model: ModelShape, work: Work, reached: Sequence[_Block]) -> int:
    """Return what all blocks keep that the backward pass reaches, and their adapters on top.

    The lowest block counts as a whole, although it keeps nothing that lies below its adapters.
    """
    own = sum([block.kept for block in reached])
    return round(len(reached) * _kept_frozen(model, work)) + own


def _kept_of(model: ModelShape, work: Work) -> Kept:
    """Return what is known of a block of these widths."""
    widths = work.base_bytes, work.compute_bytes
    for kept in model.kept:
        if (kept.base_bytes, kept.compute_bytes) == widths:
            return kept
    # Whatever follows a linear layer keeps its output; attention keeps its own, a gate its factor.
    numbers = sum(linear.num_outputs for linear in model.linears)
    per_token = work.compute_bytes * (numbers + model.attention_size + model.intermediate_size)
    return Kept(
        base_bytes=work.base_bytes,
        compute_bytes=work.compute_bytes,
        per_token=per_token,
        per_pair=work.compute_bytes,
        freed_per_token=1.5 * per_token,  # 1.2 to 2.2 in the families that were looked at
    )


def _kept_frozen(model: ModelShape, work: Work) -> float:
    """Return what a block without adapters keeps."""
    kept, tokens = _kept_of(model, work), work.tokens
    per_block = kept.per_block if tokens else 0.0
    if work.linear_bytes is not None:  # quantised layers make their matrices anew, and keep none
        copies = work.compute_bytes * sum(linear.num_weights for linear in model.linears)
        per_block = max(0.0, per_block - copies)
    return per_block + tokens * (kept.per_token + work.length * kept.per_pair)


def _kept_adapters(adapted: list[tuple[Linear, int]], work: Work) -> int:
    """Return what the adapters of a block keep on top: their inputs and A x."""
    width, tokens = work.compute_bytes, work.tokens
    kept = sum(width * tokens * linear.num_active * rank for linear, rank in adapted)
    if work.shares_inputs:
        # Linear layers that read the same tensor keep one; what the block keeps costs nothing.
        inputs = {
            linear.input_id if linear.input_id >= 0 else linear.name: linear.num_active
            * linear.num_inputs
            for linear, _ in adapted
            if not linear.input_is_kept
        }
        return kept + width * tokens * sum(inputs.values())
    # Every adapter has an input of its own, cast or dropped; a dropout keeps float32 noise too.
    noise = 4 if work.has_lora_dropout else 0
    kept += sum(
        (width + noise) * tokens * linear.num_active * linear.num_inputs for linear, _ in adapted
    )
    if width != 4 and tokens:  # autocast's copies of the factors
        kept += sum(width * rank * linear.num_factors for linear, rank in adapted)
    return kept


def _workspace(model: ModelShape, work: Work, reached: Sequence[_Block], again: int) -> int:
    """Return the larger of head and block, whose backward passes alternate, and fragments.

    Args:
        model: Sizes of the model.
        work: What is done.
        reached: The blocks that its backward pass reaches.
        again: Activations that are there during the backward pass only.
    """
    if work.recompute in ARENA_FACTORS:
        return RUNTIME_BYTES + _arena(model, work, reached)
    head = _head_workspace(model, work) if work.has_tail else 0
    fragments = round(work.fragmentation * _freed(model, work, reached))
    return RUNTIME_BYTES + max(head, _block_workspace(model, work)) + fragments + again


def _arena(model: ModelShape, work: Work, reached: Sequence[_Block]) -> int:
    """Return what onnxruntime takes for the largest block and the tail, and never gives back."""
    factor = ARENA_FACTORS[work.recompute] if reached else 1.0  # forward only
    largest = max((block.kept for block in reached), default=0)
    found = factor * (_kept_frozen(model, work) + largest)
    if work.has_tail:
        outputs = model.num_labels or model.vocab_size
        rows = min(work.tokens, TAIL_TARGETS, targets_at_once(outputs))
        found += 2 * 4 * work.tokens * model.hidden_size + ARENA_LOGIT_BYTES * rows * outputs
    return round(found)


def _freed(model: ModelShape, work: Work, reached: Sequence[_Block]) -> float:
    """Return what the forward pass frees between activations, as far as it is in the heap."""
    kept, width = _kept_of(model, work), work.tokens * work.compute_bytes
    sides = [n for li in model.linears for n in (li.num_outputs, li.num_inputs)]
    in_heap = sum(n for n in sides if n * width <= MAX_HEAP_BYTES) / sum(sides)
    frozen = in_heap * work.tokens * (kept.freed_per_token + work.length * kept.freed_per_pair)
    freed = 0.0
    for block in reached:
        freed += frozen
        freed += block.freed
        if not work.folds_residual:
            freed += block.freed_residual
    return freed


def _freed_beside(linear: Linear, width: int) -> int:
    """Return what an adapter or residual frees beside a weight: B A x, its multiple, the sum."""
    output = linear.num_active * linear.num_outputs * width
    return 3 * output if output <= MAX_HEAP_BYTES else 0


def _block_workspace(model: ModelShape, work: Work) -> int:
    """Return a block's gradients in flight: at its widest weight and adapter, at its end."""
    if work.first == work.stop:
        return 0
    widest = max(max(li.num_outputs, li.num_inputs) for li in model.linears)
    return work.tokens * work.compute_bytes * (2 * widest + 2 * model.hidden_size)


def _head_workspace(model: ModelShape, work: Work) -> int:
    """Return what a tail takes beside its weights; every token counts as a target."""
    state = 4 * work.tokens * model.hidden_size
    if model.num_labels:
        return 2 * state + CLASSES_BYTES * work.tokens * model.num_labels  # norm and its gradient
    # States of the targets, their gradient, and that among those of all positions.
    rows = min(work.tokens, targets_at_once(model.vocab_size))
    return 3 * state + LOGITS_BYTES * rows * model.vocab_size


def _wire(model: ModelShape, work: Work) -> int:
    """Return bytes of h and dL/dh coded, one decoded; again for the ends of a tail that is here."""
    if work.has_front and work.has_tail and work.stop == model.num_blocks:
        return 0
    ends = 2 if work.has_front and work.has_tail else 1
    coded = hidden_bytes(model, work.micro_batch, work.length, work.codec_bytes)
    return ends * (2 * coded + hidden_bytes(model, work.micro_batch, work.length, 4))
