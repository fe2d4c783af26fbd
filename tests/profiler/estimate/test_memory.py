"""Estimates add up, and grow with whatever makes a device work more."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import (
    LOGITS_BYTES,
    MemoryEstimate,
    adapter_bytes,
    estimate_memory,
    hidden_bytes,
)
from profiler.estimate.sizes import Kept, Linear, ModelShape, Work

BLOCKS = 4
MODEL = ModelShape(
    num_blocks=BLOCKS,
    hidden_size=8,
    intermediate_size=20,
    num_heads=2,
    vocab_size=50,
    linears=(
        Linear("q", 8, 8, 0, 2),
        Linear("v", 4, 8, 0, 2),
        Linear("o", 8, 8, 1, 1, True),
        Linear("up", 20, 8, 2),
        Linear("down", 8, 20, 3),
    ),
    block_params=520,
    front_params=400,
    tail_params=8,
    tail_needs_front=True,
    num_labels=0,
    blocks_path="m.layers",
)
NAMES = [f"m.layers.{i}.{linear.name}" for i in range(BLOCKS) for linear in MODEL.linears]
# A device of two blocks, its rows and its adapters.
WORK = Work(
    first=0,
    stop=2,
    has_front=True,
    has_tail=False,
    ranks=dict.fromkeys(NAMES[:10], 2),
    micro_batch=3,
    length=5,
)
WORKS = st.builds(
    Work,
    first=st.integers(0, 1),
    stop=st.integers(2, BLOCKS - 1),
    has_front=st.booleans(),
    has_tail=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4)),
    micro_batch=st.integers(0, 4),
    length=st.integers(1, 9),
    base_bytes=st.sampled_from([2, 4]),
    compute_bytes=st.sampled_from([2, 4]),
    codec_bytes=st.sampled_from([2, 4]),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    trains_head=st.booleans(),
    in_flight=st.integers(1, 4),
    recompute=st.sampled_from(["none", "slice", "block", "own-block"]),
    residual_rank=st.integers(0, 4),
    folds_residual=st.booleans(),
    residual_cut=st.integers(0, 2),
    has_lora_dropout=st.booleans(),
    fragmentation=st.sampled_from([0.0, 0.5]),
)
MODELS = st.sampled_from(
    [
        MODEL,
        replace(MODEL, num_labels=3, head_params=27, tail_params=35, tail_needs_front=False),
        replace(
            MODEL,
            kept=(
                Kept(base_bytes=4, compute_bytes=4, per_token=170.0, per_pair=4.0),
                Kept(base_bytes=4, compute_bytes=2, per_block=640.0, per_token=96.0, per_pair=2.0),
                Kept(base_bytes=2, compute_bytes=2, per_token=80.0, freed_per_token=120.0),
            ),
        ),
    ]
)


def more(work: Work, field: str) -> Work:
    """The same work with more of one thing."""
    changes: dict[str, Any] = {
        "stop": work.stop + 1,
        "micro_batch": work.micro_batch + 1,
        "length": work.length + 1,
        "base_bytes": work.base_bytes + 2,
        "codec_bytes": work.codec_bytes + 2,
        "in_flight": work.in_flight + 1,
        "residual_rank": work.residual_rank + 1,
        "fragmentation": work.fragmentation + 0.5,
        "optimizer": "adamw",
        "has_front": True,
        "has_tail": True,
        "trains_head": True,
        "has_lora_dropout": True,
        "ranks": {name: work.ranks.get(name, 0) + 1 for name in NAMES},
    }
    return replace(work, **{field: changes[field]})


GROWING = st.sampled_from(
    [
        *("stop", "micro_batch", "length", "ranks", "residual_rank", "has_lora_dropout"),
        *("in_flight", "codec_bytes", "fragmentation", "optimizer", "trains_head", "has_tail"),
    ]
)


@given(MODELS, WORKS, GROWING)
def test_more_work_takes_no_less_memory(model: ModelShape, work: Work, field: str) -> None:
    """No part shrinks when one thing grows, but for tensors that need no wire any more."""
    before, after = estimate_memory(model, work), estimate_memory(model, more(work, field))

    # A tiny model's last block weighs less than the tensors that need no wire with it.
    assert after.total - after.wire >= before.total - before.wire
    for name in {f.name for f in fields(MemoryEstimate)} - {"wire"}:
        assert getattr(after, name) >= getattr(before, name)


@given(MODELS, WORKS, GROWING)
def test_more_work_takes_no_less_time(model: ModelShape, work: Work, field: str) -> None:
    """Operations grow with rows, length, depth, ranks and residual."""
    before, after = estimate_flops(model, work), estimate_flops(model, more(work, field))

    assert after.forward >= before.forward
    assert after.backward >= before.backward


@given(MODELS, WORKS)
def test_wider_numbers_take_more_memory(model: ModelShape, work: Work) -> None:
    """A base of four bytes takes twice what one of two takes; nothing else of it changes."""
    narrow = replace(work, base_bytes=2, compute_bytes=4)
    wide = replace(narrow, base_bytes=4)

    assert estimate_memory(model, wide).base == 2 * estimate_memory(model, narrow).base
    assert estimate_memory(model, wide).adapters == estimate_memory(model, narrow).adapters


def test_gradients_of_its_own_making_take_more_memory() -> None:
    """What onnxruntime keeps of a block grows with the form, and nothing else does."""
    sent, own = (
        estimate_memory(MODEL, replace(WORK, recompute=how)) for how in ("block", "own-block")
    )

    assert own.workspace > sent.workspace
    assert replace(own, workspace=sent.workspace) == sent


def test_a_device_by_hand() -> None:
    """Every part of a device of two blocks, computed by hand."""
    found = estimate_memory(MODEL, replace(WORK, residual_rank=3), overhead_bytes=7)

    trained = 2 * 2 * (16 + 12 + 16 + 28 + 28)
    tokens = 15
    frozen = 4 * (tokens * (8 + 4 + 8 + 20 + 8 + 8 + 20) + tokens * 5)
    own = 4 * tokens * (5 * 2 + 8 + 8 + 20)  # A x; inputs of q and v, of up and of down
    assert found.base == 4 * (2 * 520 + 400)
    assert found.adapters == found.gradients == 4 * trained
    assert found.optimizer == 8 * trained
    assert found.residual == 4 * 3 * 2 * (16 + 12 + 16 + 28 + 28)
    assert found.activations == 2 * (frozen + own)
    assert found.wire == tokens * 8 * (2 + 2 + 4)
    assert found.overhead == 7
    assert found.total == sum(getattr(found, f.name) for f in fields(found))


def test_below_the_lowest_adapter_nothing_is_kept() -> None:
    """Blocks under the first adapted one have no backward pass, unless h comes from elsewhere."""
    top = {name: 2 for name in NAMES[5:10]}

    device = estimate_memory(MODEL, replace(WORK, ranks=top))
    middle = estimate_memory(MODEL, replace(WORK, ranks=top, has_front=False))
    frozen = estimate_memory(MODEL, replace(WORK, ranks={}))

    assert 2 * device.activations == estimate_memory(MODEL, WORK).activations
    assert middle.activations > device.activations
    assert frozen.activations == 0
    assert estimate_flops(MODEL, replace(WORK, ranks={})).backward == 0


@pytest.mark.parametrize("compute_bytes", [2, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("fragmentation", [0.0, 0.5])
def test_prices_of_adapters_add_up(
    compute_bytes: int, optimizer: str, fragmentation: float
) -> None:
    """All adapters of a block together cost what the estimate grows by."""
    work = replace(
        WORK, compute_bytes=compute_bytes, optimizer=optimizer, fragmentation=fragmentation
    )
    work = replace(work, has_front=False)  # so that the frozen blocks keep the same
    none = replace(work, ranks={})

    prices = 2 * sum(
        adapter_bytes(linear, 2, 15, compute_bytes, optimizer, fragmentation)
        for linear in MODEL.linears
    )

    assert prices == estimate_memory(MODEL, work).total - estimate_memory(MODEL, none).total


def test_an_adapter_by_hand() -> None:
    """16 bytes per parameter with AdamW, 8 with SGD, A x, and the input if nobody else has it."""
    lone = Linear("w", 10, 6)

    assert adapter_bytes(lone, 2, 0) == 16 * 2 * 16
    assert adapter_bytes(lone, 2, 0, optimizer="sgd") == 8 * 2 * 16
    assert adapter_bytes(lone, 2, 5, fragmentation=0.0) == 16 * 2 * 16 + 4 * 5 * (2 + 6)
    kept = replace(lone, input_is_kept=True)
    assert adapter_bytes(kept, 2, 5, fragmentation=0.0) == 16 * 2 * 16 + 4 * 5 * 2
    assert adapter_bytes(lone, 0, 5) == 0


def test_an_optimizer_is_known_or_refused() -> None:
    """Nothing is guessed for an optimizer that nobody has counted."""
    with pytest.raises(ValueError, match="optimizer 'lion' is not one of adamw, sgd"):
        estimate_memory(MODEL, replace(WORK, optimizer="lion"))


def test_recomputation_moves_activations_to_the_backward_pass() -> None:
    """Between the passes only ends are there; forward is computed twice; the peak stays."""
    kept, again = WORK, replace(WORK, recompute="slice")

    first, second = estimate_memory(MODEL, kept), estimate_memory(MODEL, again)

    assert second.activations == 2 * 15 * 8 * 4
    assert second.total == first.total
    flops, more_flops = estimate_flops(MODEL, kept), estimate_flops(MODEL, again)
    assert more_flops.backward == flops.backward + flops.forward


def test_a_hidden_state_has_its_bytes() -> None:
    """Bytes are positions times size times width."""
    assert hidden_bytes(MODEL, 3, 5, 2) == 3 * 5 * 8 * 2


def test_large_tensors_do_not_fragment() -> None:
    """What outgrows the allocator's heap is taken as it is; adapters are priced as before."""
    rows = 32 * 2**20 // (4 * 5)  # every side of every weight is larger than the heap takes
    work = replace(WORK, micro_batch=rows, has_front=False, ranks={})

    assert (
        estimate_memory(MODEL, work).total
        == estimate_memory(MODEL, replace(work, fragmentation=0.0)).total
    )


def test_a_head_takes_no_more_for_more_tokens_than_have_logits_at_once() -> None:
    """With 151,936 words twice the tokens cost three more states each, and no more logits."""
    model = replace(MODEL, vocab_size=151_936, num_labels=0)

    def workspace(length: int) -> int:
        work = Work(
            first=MODEL.num_blocks,
            stop=MODEL.num_blocks,
            has_front=False,
            has_tail=True,
            ranks={},
            micro_batch=1,
            length=length,
        )
        return estimate_memory(model, work).workspace

    assert workspace(2048) - workspace(1024) == 3 * 4 * 1024 * MODEL.hidden_size
    assert workspace(2048) < 300 * 2**20 < LOGITS_BYTES * 1024 * 151_936
