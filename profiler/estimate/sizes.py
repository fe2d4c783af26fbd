"""Sizes of a model, and what one side of the cut does with it for one micro-batch.

Pure: what these cost is `memory.py` (bytes) and `flops.py` (operations); where the sizes come
from is `edge_sdk/model/shape.py`. Knows no torch, no model family, no device and no plan.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

# Share of what a forward pass makes and frees whose place in glibc's heap is not used again: torch
# asks for aligned blocks, which fit badly into holes of their own size. Measured as 0.35 to 0.9 on
# Linux x86-64 (benchmarks/memory.py). With MALLOC_MMAP_THRESHOLD_=131072 in the environment every
# tensor has pages of its own, and it is 0.
FRAGMENTATION = 0.55
# Targets whose logits a device on onnxruntime has at the same time: 26 MB with a vocabulary of
# 50,000. Half as many cost time, twice as many only memory.
TAIL_TARGETS = 128
# Logits that a tail has at the same time: 64 MiB in float32, of 110 targets with a vocabulary of
# 151,936. Fewer would read the head more often than they compute with it.
TAIL_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a block, or experts that lie in one parameter."""

    name: str
    """Name inside the block, such as `self_attn.q_proj` or `mlp.experts.down_proj`."""
    num_outputs: int
    num_inputs: int
    input_id: int = -1
    """Number of the input tensor, the same for q, k and v; -1: no other layer reads it."""
    num_sharing: int = 1
    """Linear layers of the block that read this input, this one included."""
    input_is_kept: bool = False
    """Whether a frozen block keeps the input anyway: attention's output does, for one."""

    num_experts: int = 1
    """Matrices of this size; 1 for a linear layer."""
    num_active: int = 1
    """Matrices that one token passes through."""

    @property
    def num_weights(self) -> int:
        """Entries of all matrices."""
        return self.num_experts * self.num_outputs * self.num_inputs

    @property
    def num_factors(self) -> int:
        """Entries of A and B for each rank."""
        return self.num_experts * (self.num_outputs + self.num_inputs)

    @property
    def most_rank(self) -> int:
        """Largest rank that a matrix can have."""
        return min(self.num_outputs, self.num_inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one frozen block keeps from its forward to its backward pass, in bytes."""

    base_bytes: int
    """Width of the frozen parameters that this holds for."""
    compute_bytes: int
    """Width of activations that this holds for."""
    per_block: float = 0.0
    """Bytes whatever the input: copies of weights in the width of the computation."""
    per_token: float = 0.0
    """Bytes for each of the B T tokens."""
    per_pair: float = 0.0
    """Bytes for each of the B T T pairs of positions: masks, or scores that attention keeps."""
    freed_per_token: float = 0.0
    """Bytes that come and go in the forward pass, for each token."""
    freed_per_pair: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model; all its blocks count as alike."""

    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    linears: tuple[Linear, ...]
    """All linear layers of one block, in the order in which they run."""
    block_params: int
    """Parameters of one block."""
    front_params: int
    """Parameters before the blocks: embeddings."""
    tail_params: int
    """Parameters after the blocks: final norm, head; a head tied to the embeddings is not here."""
    tail_needs_front: bool
    """Whether the tail computes with a tensor of the front."""
    num_labels: int
    """Classes; 0 for a causal language model."""
    blocks_path: str
    """Weights are called `<blocks_path>.<block>.<linear's name>`."""
    head_dim: int = 0
    """Size of an attention head; 0: hidden_size / num_heads."""
    head_params: int = 0
    """Parameters of the tail that a classifier trains in full."""
    late_params: int = 0
    """Parameters of the front that blocks after the first compute with."""
    kept: tuple[Kept, ...] = ()
    """What a block keeps, for each width that was observed."""

    @property
    def attention_size(self) -> int:
        """Sizes of all heads together."""
        return self.num_heads * (self.head_dim or self.hidden_size // self.num_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one side does with one micro-batch."""

    first: int
    """Blocks first .. stop-1 are computed."""
    stop: int
    has_front: bool
    has_tail: bool
    ranks: Mapping[str, int]
    """Rank of each adapted weight, by whole-model name; 0 or absent: none."""
    micro_batch: int
    """Sequences."""
    length: int
    """Tokens of the longest of them: padding is computed too."""
    base_bytes: int = 4
    """Bytes of a frozen parameter."""
    linear_bytes: float | None = None
    """Bytes of a weight of a block's linear layers if they are quantised; None: as the others."""
    compute_bytes: int = 4
    """Bytes of an activation; 2 stands for autocast."""
    codec_bytes: float = 2
    """Bytes of a number on the wire."""
    optimizer: str = "adamw"
    """`adamw` or `sgd`."""
    trains_head: bool = False
    """Whether a classifier's head is trained here."""
    in_flight: int = 1
    """Micro-batches that are between their forward and their backward pass at the same time."""
    recompute: str = "none"
    """What the backward pass computes again: one of `RECOMPUTE` of `profile.py`."""
    residual_rank: int = 0
    """Rank of the frozen residual of every weight in `ranks`."""
    residual_cut: int = 0
    """Most ranks of it that a step computes with, held beside all of it; 0: a step takes all."""
    folds_residual: bool = False
    """Whether it is added to the frozen weights once a round, and no step computes with it."""
    has_lora_dropout: bool = False
    """Whether adapters drop part of their input."""
    fragmentation: float = FRAGMENTATION
    """Share of what comes and goes in a forward pass that the allocator cannot use again."""

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, padding included."""
        return self.micro_batch * self.length

    @property
    def residual_used(self) -> int:
        """Ranks of the residual that a step computes with."""
        if self.folds_residual:
            return 0
        return min(self.residual_rank, self.residual_cut or self.residual_rank)

    @property
    def shares_inputs(self) -> bool:
        """Whether adapters keep the block's own tensors, not casts or dropouts of them."""
        return self.compute_bytes == 4 and not self.has_lora_dropout


def targets_at_once(vocab_size: int) -> int:
    """Return the targets of which a tail has logits at the same time."""
    return max(1, TAIL_LOGITS // vocab_size)


BlockRanks = tuple[int | None, ...]
"""Rank of each linear layer of a block, in their order; None where it has no adapter."""


Known = dict[Hashable, Any]
"""Costs of single blocks of one model, which an estimate that is asked again need not find anew."""


def block_ranks(model: ModelShape, work: Work) -> list[BlockRanks]:
    """Return the ranks of blocks first .. stop-1."""
    names, rank_of = [linear.name for linear in model.linears], work.ranks.get
    if not work.ranks:
        return [(None,) * len(names)] * (work.stop - work.first)
    found = []
    for block in range(work.first, work.stop):
        prefix = f"{model.blocks_path}.{block}."
        found.append(tuple([rank_of(prefix + name) for name in names]))
    return found


def lowest_block(work: Work, blocks: list[BlockRanks]) -> int:
    """Return the first block that the backward pass reaches: the very first without a front.

    Args:
        work: What is done.
        blocks: The ranks of its blocks.
    """
    if not work.has_front:
        return work.first
    reached = (work.first + n for n, ranks in enumerate(blocks) if any(ranks))
    return next(reached, work.stop)
