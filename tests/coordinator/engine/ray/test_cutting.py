"""Blocks over stages and rows over actors: everything once, and about as much to each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.engine.interface import Job
from coordinator.engine.ray.cutting import SNAP, Homes, Portion, cut, joined, stretches
from edge_sdk.model.layout import Layout
from tests.coordinator.engine.test_local import known

NUM_BLOCKS = 8


def job(device: str, split: int, rows: int, length: int) -> Job:
    """A micro-batch whose hidden state says which row is which."""
    hidden = np.arange(rows, dtype=np.float32)[:, None, None].repeat(length, 1).repeat(2, 2)
    lengths = np.full(rows, length, np.int32)
    return Job(device, split, float(rows), rows, hidden, lengths, None)


jobs_of_a_wave = st.lists(
    st.tuples(st.integers(1, NUM_BLOCKS), st.integers(1, 9), st.integers(1, 12)),
    min_size=1,
    max_size=8,
).map(lambda sizes: [job(f"d{i}", *size) for i, size in enumerate(sizes)])


@given(jobs_of_a_wave, st.integers(1, 9))
def test_every_row_is_in_one_part(jobs: list[Job], num_parts: int) -> None:
    """Put together again, the parts of a wave are the wave; no part has a micro-batch twice."""
    parts = cut([Portion(own, 0, len(own.lengths_B)) for own in jobs], num_parts, NUM_BLOCKS)

    found: dict[tuple[str, int], list[tuple[int, np.ndarray]]] = {}
    for part in parts:
        assert part
        places = [portion.job.place for portion in part]
        assert len(set(places)) == len(places)
        for portion in part:
            found.setdefault(portion.job.place, []).append((portion.start, portion.job.hidden_BTD))
    whole = joined(jobs, found)
    for own in jobs:
        assert np.array_equal(whole[own.place], own.hidden_BTD)
    assert len(parts) <= num_parts


def test_equal_rows_are_cut_into_equal_parts() -> None:
    """A single device's rows occupy all parts alike."""
    own = job("a", 1, rows=8, length=5)

    parts = cut([Portion(own, 0, 8)], 4, NUM_BLOCKS)

    assert [[(p.start, p.stop) for p in part] for part in parts] == [
        [(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)],
    ]  # fmt: skip


def test_a_wanted_position_follows_its_row() -> None:
    """Of a final hidden state at few positions each part has those of its own rows."""
    wanted = np.zeros((4, 3), bool)
    wanted[[0, 1, 1, 3], [0, 1, 2, 2]] = True
    whole = replace(job("a", 1, rows=4, length=3), wanted_BT=wanted)
    grads = np.arange(4, dtype=np.float32)[:, None]

    parts = cut([Portion(whole, 0, 4)], 2, NUM_BLOCKS)

    pieces = [portion.of(whole, grads) for part in parts for portion in part]
    assert [len(piece) for piece in pieces] == [3, 1]
    assert np.array_equal(np.concatenate(pieces), grads)


@given(jobs_of_a_wave)
def test_a_device_keeps_its_replica_while_all_have_enough(jobs: list[Job]) -> None:
    """Devices are told a replica once; only rows that balance the work go elsewhere."""
    homes = Homes(2)

    first = {own.device: homes.of(own.device) for own in jobs}
    deals = homes.deal(jobs, NUM_BLOCKS)

    assert first == {own.device: homes.of(own.device) for own in jobs}
    assert abs(list(first.values()).count(0) - list(first.values()).count(1)) <= 1
    work = [
        sum(p.job.hidden_BTD[:, :, 0].size * (NUM_BLOCKS - p.job.split + 1) for p in part)
        for part in deals
    ]
    row = max(own.hidden_BTD.shape[1] * (NUM_BLOCKS - own.split + 1) for own in jobs)
    assert max(work) <= (0.5 + SNAP) * sum(work) + row


@pytest.mark.parametrize("num_stages", [1, 2, 3, 9])
def test_every_part_is_where_it_is_needed(num_stages: int) -> None:
    """Blocks lie in one stage each, in order; the last has the tail and what that reads."""
    layout: Layout = known("gpt2").layout

    found = stretches(layout, 1, layout.part_names(), num_stages)

    blocks = [part for own in found for part in own.parts if part.startswith("block.")]
    assert blocks == [f"block.{i}" for i in range(layout.num_blocks)]
    assert len(found) == min(num_stages, layout.num_blocks - 1)
    assert "front" in found[0].parts
    assert "tail" in found[-1].parts
    assert [own.stop for own in found] == [*(own.first for own in found[1:]), None]
