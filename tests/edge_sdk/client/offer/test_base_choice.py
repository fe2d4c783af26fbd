"""`base: auto` is float32 where that fits, int8 where memory asks for it, and stays for the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_sdk.client.offer.base_choice import (
    MOST_SHARE,
    BaseChoice,
    choose,
    keep_choice,
    kept_choice,
    with_base,
)
from profiler.estimate.memory import estimate_memory
from profiler.estimate.sizes import Linear, ModelShape, Work

SHAPE = ModelShape(
    num_blocks=8,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=8,
    head_dim=128,
    vocab_size=32_000,
    linears=(Linear("up", 4096, 1024), Linear("down", 1024, 4096)),
    block_params=8 * 2**20 + 2048,
    front_params=32_000 * 1024,
    late_params=0,
    tail_params=1024,
    tail_needs_front=True,
    num_labels=0,
    blocks_path="layers",
)
WORK = Work(first=0, stop=8, has_front=True, has_tail=True, ranks={}, micro_batch=1, length=128)
FULL = estimate_memory(SHAPE, WORK, 10**8).total


@pytest.mark.parametrize(
    ("have", "base"),
    [
        (FULL / MOST_SHARE + 1, "float32"),
        (FULL / MOST_SHARE - 1, "int8"),
        (FULL / 100, "int8"),
        (None, "float32"),
    ],
)
def test_the_budget_decides(have: float | None, base: str) -> None:
    """To the byte; with an unknown budget nothing changes."""
    assert choose(SHAPE, WORK, have, 1e8).base == base


def test_the_reason_has_all_numbers() -> None:
    """What float32 takes, what there is, and what int8 would take: a person can judge it."""
    packed = estimate_memory(SHAPE, with_base(WORK, "int8"), 10**8).total
    mib = 2**20

    base, reason = choose(SHAPE, WORK, FULL, 1e8)

    assert base == "int8"
    assert reason == (
        f"8 of 8 blocks take {FULL / mib:,.0f} MiB in float32, of {FULL / mib:,.0f} MiB for the "
        f"run; {packed / mib:,.0f} MiB in int8"
    )


def test_int8_is_a_quarter_of_the_blocks_weights() -> None:
    """Embeddings and the rest of the work stay as they are."""
    found = estimate_memory(SHAPE, with_base(WORK, "int8")).base
    before = estimate_memory(SHAPE, WORK).base

    assert before - found == 3 * 8 * 8 * 2**20
    assert with_base(with_base(WORK, "int8"), "float32") == replace(WORK, linear_bytes=None)


def test_a_choice_is_found_again(tmp_path: Path) -> None:
    """As it was written; what is missing, damaged or unknown counts as none."""
    choice = BaseChoice("int8", "because")
    assert kept_choice(tmp_path) is None

    keep_choice(tmp_path, choice)

    assert kept_choice(tmp_path) == choice
    for damaged in ('{"base": "int8"', '{"base": "int3", "reason": ""}', "[]", '{"base": "int8"}'):
        (tmp_path / "base.json").write_text(damaged)
        assert kept_choice(tmp_path) is None
