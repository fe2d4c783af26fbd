"""Which stage holds which blocks, and which rows of a wave go where: pure decisions.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from coordinator.engine.interface import Job
from coordinator.engine.passage import in_order
from edge_sdk.lora.factors import Array
from edge_sdk.model.layout import Layout
from edge_sdk.protocol.plan import Place

# Parts of a wave for each stage of a row: with so many, stages wait for another at most
# (S - 1) / (4 S + S - 1) of the time, 11 % for two; more would be smaller ones.
PARTS_A_STAGE = 4
# A cut is moved to the end of a micro-batch where that changes a part by so much at most.
SNAP = 0.125


class Stretch(NamedTuple):
    """What one stage holds."""

    first: int
    """First block that it trains."""
    stop: int | None
    """Block after the last one; None: it has the model's end."""
    parts: tuple[str, ...]
    """Parts of the model, some of them only to evaluate."""

    def takes(self, split: int) -> bool:
        """Return whether rows of devices with *split* blocks have entered by its end."""
        return self.stop is None or split < self.stop


def stretches(layout: Layout, first: int, parts: Sequence[str], num_stages: int) -> list[Stretch]:
    """Share blocks *first* .. L-1 out over at most *num_stages* stages, as evenly as cuts allow.

    Blocks before them, and the front, which are there to evaluate, lie in the first stage.

    Args:
        layout: The model's parts and cuts.
        first: First block that is trained.
        parts: What one stage alone would hold.
        num_stages: Stages that are wanted.
    """
    last, starts = layout.num_blocks, [first]
    for i in range(1, num_stages):
        wanted = first + (last - first) * i / num_stages
        free = [k for k in layout.cuts if starts[-1] < k < last]
        if free:
            starts.append(min(free, key=lambda k: abs(k - wanted)))
    stops = [*starts[1:], None]
    if len(starts) == 1:
        return [Stretch(first, None, tuple(parts))]
    found = []
    for start, stop in zip(starts, stops, strict=True):
        own = [
            part
            for part in parts
            if part.startswith("block.") and _is_within(int(part[6:]), start, stop, first)
        ]
        own += ["tail"] * (stop is None and "tail" in parts)
        has_front = (start == first and "block.0" in parts) or (
            stop is None and "tail" in parts and layout.tail_needs_front
        )
        if has_front and "front" in parts:
            own.append("front")
        elif layout.late:
            own.append("late")
        found.append(Stretch(start, stop, tuple(own)))
    return found


def _is_within(block: int, start: int, stop: int | None, first: int) -> bool:
    begins = 0 if start == first else start
    return begins <= block and (stop is None or block < stop)


class Portion(NamedTuple):
    """Some rows of a micro-batch."""

    job: Job
    """The micro-batch, or what stands for these rows of it."""
    start: int
    """The first of the rows in the whole micro-batch."""
    stop: int
    """The row after them."""

    def of(self, whole: Job, array: Array) -> Array:
        """Return its part of what is of the shape of the final hidden state of *whole*."""
        if whole.wanted_BT is None:
            return array[self.start : self.stop]
        before, own = (int(whole.wanted_BT[rows].sum()) for rows in self._stretches())
        return array[before : before + own]

    def _stretches(self) -> tuple[slice, slice]:
        return slice(0, self.start), slice(self.start, self.stop)


def _portion(job: Job, start: int, stop: int) -> Portion:
    if start == 0 and stop == len(job.lengths_B):
        return Portion(job, start, stop)
    own = {
        name: value[start:stop]
        for name in ("hidden_BTD", "lengths_B", "labels", "ids_BT", "pooled_B", "wanted_BT")
        if (value := getattr(job, name)) is not None
    }
    return Portion(replace(job, **own), start, stop)


def cut(portions: Iterable[Portion], num_parts: int, num_blocks: int) -> list[list[Portion]]:
    """Cut a row of micro-batches into parts of about the same work, none of them empty.

    Work is counted in tokens, padding included, times the blocks that they pass through.
    """
    given = list(portions)
    work = [p.job.hidden_BTD.shape[1] * (num_blocks - p.job.split + 1) for p in given]
    size = sum(w * (p.stop - p.start) for w, p in zip(work, given, strict=True)) / num_parts
    found: list[list[Portion]] = [[] for _ in range(num_parts)]
    done = 0.0
    for per_row, portion in zip(work, given, strict=True):
        rows = portion.stop - portion.start
        middles = (done + per_row * (np.arange(rows) + 0.5)) / size
        for index, (start, stop) in _snapped(middles, num_parts, per_row / size).items():
            own = _portion(portion.job, start, stop)
            at = portion.start
            found[index].append(Portion(own.job, at + own.start, at + own.stop))
        done += per_row * rows
    return [part for part in found if part]


def _snapped(middles: np.ndarray, num_parts: int, share: float) -> dict[int, tuple[int, int]]:
    """Return which rows of a micro-batch go into which part.

    Args:
        middles: Where in the wave the middle of each row is, in parts.
        num_parts: How many parts there are.
        share: A row's work, in parts.
    """
    indices = np.minimum(middles.astype(int), num_parts - 1)
    counts = {int(i): int(n) for i, n in zip(*np.unique(indices, return_counts=True), strict=True)}
    for edge, into in ((min(counts), 1), (max(counts), -1)):
        if edge + into in counts and counts[edge] * share <= SNAP:
            counts[edge + into] += counts.pop(edge)
    rows, start = {}, 0
    for index in sorted(counts):
        rows[index] = (start, start + counts[index])
        start += counts[index]
    return rows


@dataclass
class Homes:
    """Which replica serves which device; once told, it stays so."""

    num_replicas: int
    _homes: dict[str, int] = field(default_factory=dict)

    def of(self, device: str) -> int:
        """Return the replica of *device*: of a new one, that which has the fewest."""
        if device not in self._homes:
            counts = [0] * self.num_replicas
            for home in self._homes.values():
                counts[home] += 1
            self._homes[device] = counts.index(min(counts))
        return self._homes[device]

    def deal(self, jobs: Sequence[Job], num_blocks: int) -> list[list[Portion]]:
        """Deal a wave out over the replicas: each its own devices, as far as all then have to do.

        Rows that would leave another replica idle are computed there: gradients add up, wherever
        they are found.
        """
        whole = [Portion(job, 0, len(job.lengths_B)) for job in in_order(jobs)]
        for name in sorted({job.device for job in jobs}):
            self.of(name)
        by_home = sorted(whole, key=lambda portion: self.of(portion.job.device))
        return cut(by_home, self.num_replicas, num_blocks)


def joined(
    jobs: Sequence[Job], found: Mapping[Place, Sequence[tuple[int, Array]]]
) -> dict[Place, Array]:
    """Put together what was found for portions, each with its first row, by micro-batch."""
    arrays = {}
    for job in jobs:
        if job.place in found:
            pieces = [array for _, array in sorted(found[job.place], key=lambda piece: piece[0])]
            # A copy also of a single one: it lies in memory that all processes share.
            arrays[job.place] = np.concatenate(pieces)
    return arrays


def without_hidden(job: Job) -> Job:
    """Return *job* for whoever needs only the shape (B, T) of its hidden state."""
    return replace(job, hidden_BTD=np.empty((*job.hidden_BTD.shape[:2], 0), np.float32))
