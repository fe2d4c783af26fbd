"""Floating-point operations of a stretch of a model, its adapters and one micro-batch.

Pure arithmetic. Counts matrix products and attention, as torch's own counter does; what is small
beside them (norms, activation functions, softmax, the optimizer) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiler.estimate.sizes import (
    BlockRanks,
    Known,
    ModelShape,
    Work,
    block_ranks,
    lowest_block,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopsEstimate:
    """Floating-point operations of one micro-batch; a multiply-add is two."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def estimate_flops(model: ModelShape, work: Work, known: Known | None = None) -> FlopsEstimate:
    """Return the operations of one micro-batch of *work*: matrix products and attention.

    Frozen weights take part in the backward pass of the activations only; below the lowest adapter
    there is none.

    Args:
        model: Sizes of the model.
        work: The stretch, its adapters and the micro-batch.
        known: As in `estimate_memory`.
    """
    known = {} if known is None else known
    blocks = block_ranks(model, work)
    lowest = lowest_block(work, blocks) - work.first
    about = "flops", work.tokens, work.length, work.residual_used
    forward = backward = 0.0
    for block, ranks in enumerate(blocks):
        key = ranks, work.has_front and block == lowest, about
        passes = known.get(key)
        if passes is None:
            passes = known[key] = _block_flops(model, work, ranks, is_lowest=key[1])
        forward += passes.forward
        backward += passes.backward if block >= lowest else 0.0
    reaches_blocks = lowest < len(blocks)
    blocks_forward = forward if reaches_blocks else 0.0
    if work.has_tail:
        head = _head_flops(model, work)
        forward += head
        is_reached = reaches_blocks or not work.has_front
        backward += head * (is_reached + (work.trains_head and model.num_labels > 0))
    again = blocks_forward if work.recompute != "none" else 0.0
    return FlopsEstimate(forward=forward, backward=backward + again)


def _block_flops(
    model: ModelShape, work: Work, block: BlockRanks, *, is_lowest: bool
) -> FlopsEstimate:
    """Return both passes of one block; *is_lowest*: its input needs no gradient."""
    attention = 4.0 * work.tokens * work.length * model.attention_size  # Q K^T and P V
    forward, backward = attention, 2.5 * attention  # Q K^T is computed again
    start = next((i for i, rank in enumerate(block) if rank), 0) if is_lowest else 0
    for i, (linear, given) in enumerate(zip(model.linears, block, strict=True)):
        sides, tokens = linear.num_outputs + linear.num_inputs, work.tokens * linear.num_active
        residual = 0 if given is None else min(work.residual_used, linear.most_rank)
        rank = given or 0
        frozen = 2.0 * (linear.num_outputs * linear.num_inputs + residual * sides)
        own = 2.0 * rank * sides
        forward += tokens * (frozen + own)
        if i < start:
            continue
        is_entry = i == start or linear.input_id == model.linears[start].input_id >= 0
        asks = not (is_lowest and is_entry)
        # For dA and dB, then for dx; without it, d(A x) alone.
        backward += tokens * (own + (frozen + own if asks else 2.0 * rank * linear.num_outputs))
    return FlopsEstimate(forward=forward, backward=backward)


def _head_flops(model: ModelShape, work: Work) -> float:
    """Return one pass through the head: every token, or one pooled state of each sequence."""
    if model.num_labels:
        return 2.0 * work.micro_batch * model.tail_params
    return 2.0 * work.tokens * model.hidden_size * model.vocab_size
