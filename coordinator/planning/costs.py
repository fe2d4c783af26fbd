"""What splits and ranks cost on one device and on the coordinator, by the profiler's estimates.

It turns a planning problem into the table from which `splits.py` chooses; what ranks are worth and
cost is `pricing/rank_tables.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from coordinator.aggregation.rules import SERVER
from coordinator.config.run import AUTO
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.splits import Option, Server
from edge_sdk.model.precision import base_widths
from edge_sdk.protocol.codecs import find
from edge_sdk.protocol.residual import CHANGE, GRADIENT, RESIDUAL, TOP_GRADIENT, WHOLE, plain
from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import estimate_memory, hidden_bytes
from profiler.estimate.sizes import Work

Ranks = Mapping[str, int]
# Codecs from which `auto` chooses, the most exact first.
AUTO_CODECS = ("bfloat16", "int8", RESIDUAL)
# What `auto` means where speed or link are unknown: what is lost in 8 bits is hardly measurable.
UNKNOWN_CODEC = "int8"
# Most of a device's own computing time that its link may take before it is given fewer bytes.
LINK_SHARE = 0.25


class Load(NamedTuple):
    """What passes through a weight."""

    tokens: int
    """Tokens in one wave."""
    in_flight: int = 1
    """Waves that are between forward and backward pass at the same time."""
    base_bytes: int = 4
    """Bytes of one frozen parameter."""
    compute_bytes: int = 4
    """Bytes of one number in an activation."""


def first_ranks(problem: PlanningProblem, device: str, first: int, stop: int) -> dict[str, int]:
    """Return the ranks that a stretch of blocks is priced with; nobody may change them."""

    def make() -> dict[str, int]:
        return {n: problem.first_rank(device, n) for n in problem.weights(first, stop)}

    return problem.known.of(("first ranks", problem.kind(device), first, stop), make)


# ---- memory ----


def adapters_bytes(problem: PlanningProblem, ranks: Ranks, loads: Mapping[str, Load]) -> float:
    """Return the bytes that adapters of *ranks* add, each weight under its load."""
    blocks: dict[tuple[int, Load], dict[str, int]] = {}
    for name, rank in ranks.items():
        block, inside = problem.place(name)
        blocks.setdefault((block, loads[name]), {})[inside] = rank
    return math.fsum(
        block_adapters_bytes(problem, tuple(own.items()), load) for (_, load), own in blocks.items()
    )


def block_adapters_bytes(
    problem: PlanningProblem, ranks: tuple[tuple[str, int], ...], load: Load
) -> float:
    """Return the bytes that adapters add to one block; ranks are by name inside the block."""
    given = tuple((name, rank) for name, rank in ranks if rank > 0)
    return _block_bytes(problem, given, load) - _block_bytes(problem, (), load)


def _block_bytes(problem: PlanningProblem, ranks: tuple[tuple[str, int], ...], load: Load) -> int:
    """Return the bytes of one block inside a stretch; only differences of it mean something."""
    return problem.known.of(("block", ranks, load), lambda: _find_block_bytes(problem, ranks, load))


def _find_block_bytes(
    problem: PlanningProblem, ranks: tuple[tuple[str, int], ...], load: Load
) -> int:
    config, path = problem.config, problem.model.blocks_path
    work = Work(
        first=0,
        stop=1,
        has_front=False,
        has_tail=False,
        ranks={f"{path}.0.{name}": rank for name, rank in ranks},
        micro_batch=load.tokens,
        in_flight=load.in_flight,
        base_bytes=load.base_bytes,
        compute_bytes=load.compute_bytes,
        length=1,
        optimizer=config.training.optimizer,
        has_lora_dropout=config.lora.lora_dropout > 0,
    )
    return estimate_memory(problem.model, work).total


def device_loads(problem: PlanningProblem, device: str, split: int) -> dict[str, Load]:
    """Return what passes through each of a device's weights."""
    load = Load(
        problem.tokens(device), _in_flight(problem, device, split), *_widths(problem, device)
    )
    return dict.fromkeys(problem.weights(0, split), load)


def _widths(problem: PlanningProblem, device: str) -> tuple[int, int]:
    """Return the bytes of one of a device's frozen parameters, and of one activation."""
    profile = problem.profile(device)
    return int(profile.base_bytes or 4), int(profile.compute_bytes or 4)


def _in_flight(problem: PlanningProblem, device: str, split: int) -> int:
    return 1 if split == problem.num_blocks else problem.in_flight(device)


def device_bytes(problem: PlanningProblem, device: str, split: int, ranks: Ranks) -> float:
    """Return the peak bytes of a device's process."""
    codec = codec_of(problem, device, split)
    work = _device_work(problem, device, split, ranks, codec)
    return _memory(problem, device, work) + _held_bytes(problem, codec)


def _memory(problem: PlanningProblem, device: str, work: Work) -> int:
    return estimate_memory(problem.model, work, _overhead(problem, device), problem.known).total


def _held_bytes(problem: PlanningProblem, codec: str) -> float:
    """Return what one side holds of a device's samples."""
    return problem.config.held_bytes if codec == RESIDUAL else 0


def device_base_bytes(problem: PlanningProblem, device: str, split: int) -> float:
    """Return the peak bytes of a device's process without any adapters."""
    one = _at_split(problem, device, split, codec_of(problem, device, split))
    return one.memory_bytes + _overhead(problem, device) + one.held_bytes - one.adapters_bytes


def _overhead(problem: PlanningProblem, device: str) -> int:
    return int(problem.profile(device).overhead_bytes or 0)


class _AtSplit(NamedTuple):
    """What a split takes of all devices of a kind, with the ranks that splits are priced with."""

    memory_bytes: int
    """Beside the process before, and what is held of samples."""
    held_bytes: float
    adapters_bytes: float
    """Part of the former."""
    flops: float
    trains: bool
    """Whether a device's own weights get a gradient."""
    rows_bytes: float
    """What its rows take on the coordinator."""
    rows_flops: float


def _at_split(problem: PlanningProblem, device: str, split: int, codec: str) -> _AtSplit:
    """Return what a split takes where hidden states and gradients travel by *codec*."""
    key = "split", problem.kind(device), split, codec, problem.residual_rank
    found: _AtSplit | None = problem.known.get(key)
    if found is None:
        found = problem.known.of(key, lambda: _price_split(problem, device, split, codec))
    return found


def _price_split(problem: PlanningProblem, device: str, split: int, codec: str) -> _AtSplit:
    own = first_ranks(problem, device, 0, split)
    rest = first_ranks(problem, SERVER, split, problem.num_blocks)
    work = _device_work(problem, device, split, own, codec)
    return _AtSplit(
        estimate_memory(problem.model, work, 0, problem.known).total,
        _held_bytes(problem, codec),
        adapters_bytes(problem, own, device_loads(problem, device, split)),
        device_flops(problem, device, split, own),
        any(own.values()),
        _rows_bytes(problem, device, split, rest, codec),
        _rows_flops(problem, device, split, rest, codec),
    )


def _device_work(
    problem: PlanningProblem, device: str, split: int, ranks: Ranks, codec: str = UNKNOWN_CODEC
) -> Work:
    config = problem.config
    has_tail = config.labels == "device" or split == problem.num_blocks
    base_bytes, compute_bytes = _widths(problem, device)
    return Work(
        first=0,
        stop=split,
        base_bytes=base_bytes,
        compute_bytes=compute_bytes,
        has_front=True,
        has_tail=has_tail,
        ranks=dict(ranks),
        linear_bytes=problem.profile(device).linear_bytes,
        recompute=problem.profile(device).recompute or "none",
        micro_batch=problem.micro_batch(device),
        in_flight=_in_flight(problem, device, split),
        length=problem.length,
        codec_bytes=_buffer_bytes(codec),
        optimizer=config.training.optimizer,
        trains_head=has_tail and config.task == "sequence-classification",
        residual_rank=problem.residual_rank,
        residual_cut=problem.settings(device).residual_rank or 0,
        folds_residual=problem.folds(device),
        has_lora_dropout=config.lora.lora_dropout > 0,
    )


def server_base_bytes(problem: PlanningProblem, first: int, ranks: Ranks) -> float:
    """Return the coordinator's bytes before any device's rows come, with blocks from *first* on.

    With a file to evaluate, or prompts, it holds the whole model, whatever the devices hold.
    """
    holds_all = problem.config.holds_all
    if first == problem.num_blocks and not holds_all:
        return 0.0
    work = _server_work(problem, SERVER, first, ranks, holds_all=holds_all)
    return estimate_memory(problem.model, work, 0, problem.known).total


def server_widths(problem: PlanningProblem) -> tuple[int, int]:
    """Return the bytes of one of the coordinator's frozen parameters, and of one activation."""
    return base_widths(problem.config.base)[0], problem.server.compute_bytes


def server_rows_bytes(problem: PlanningProblem, device: str, split: int, ranks: Ranks) -> float:
    """Return the bytes that a device's rows take on the coordinator."""
    return _rows_bytes(problem, device, split, ranks, codec_of(problem, device, split))


def _rows_bytes(
    problem: PlanningProblem, device: str, split: int, ranks: Ranks, codec: str
) -> float:
    if split == problem.num_blocks:
        return 0.0
    model, known = problem.model, problem.known
    with_rows = _server_work(problem, device, split, ranks, codec)
    empty = _server_work(problem, SERVER, split, ranks)
    rows = estimate_memory(model, with_rows, 0, known).total
    rows -= estimate_memory(model, empty, 0, known).total
    return rows + _held_bytes(problem, codec)


def _server_work(
    problem: PlanningProblem,
    device: str,
    split: int,
    ranks: Ranks,
    codec: str = "",
    *,
    holds_all: bool = False,
) -> Work:
    """Return the coordinator's work for one device's rows; for `SERVER`, that without rows."""
    config = problem.config
    has_tail = config.labels == "server" or holds_all
    base_bytes, compute_bytes = server_widths(problem)
    return Work(
        first=0 if holds_all else split,
        stop=problem.num_blocks,
        base_bytes=base_bytes,
        linear_bytes=base_widths(config.base)[1],
        compute_bytes=compute_bytes,
        has_front=holds_all,
        has_tail=has_tail,
        ranks=dict(ranks),
        micro_batch=0 if device == SERVER else problem.micro_batch(device),
        in_flight=config.open_micros,
        length=problem.length,
        codec_bytes=2 if device == SERVER else _buffer_bytes(codec),
        optimizer=config.training.optimizer,
        trains_head=config.labels == "server" and config.task == "sequence-classification",
        residual_rank=problem.residual_rank,
        folds_residual=problem.folds(SERVER),
        has_lora_dropout=config.lora.lora_dropout > 0,
    )


# ---- time ----


def device_flops(problem: PlanningProblem, device: str, split: int, ranks: Ranks) -> float:
    """Return the floating-point operations of a device in a wave."""
    work = _device_work(problem, device, split, ranks)
    return estimate_flops(problem.model, work, problem.known).total


def device_seconds(problem: PlanningProblem, device: str, split: int, ranks: Ranks) -> float | None:
    """Return a device's seconds in a wave, compute and link; None where one of both is unknown."""
    if problem.profile(device).flops_per_s is None:
        return None
    flops = device_flops(problem, device, split, ranks)
    return _seconds(problem, device, split, flops, trains=any(ranks.values()))


def _seconds(
    problem: PlanningProblem, device: str, split: int, flops: float, *, trains: bool
) -> float | None:
    """Return a device's seconds for *flops* and on the link; None where one of both is unknown."""
    speed = problem.profile(device).flops_per_s
    if speed is None:
        return None
    link_s: float | None = 0.0
    if split < problem.num_blocks:
        codec = codec_of(problem, device, split)
        link_s = link_seconds(problem, device, codec, trains=trains)
    return None if link_s is None else flops / speed + link_s


def link_seconds(
    problem: PlanningProblem, device: str, codec: str, *, trains: bool
) -> float | None:
    """Return the seconds of a device's tensors on its link in a wave; None: bandwidth unknown.

    Args:
        problem: The situation.
        device: Whose link.
        codec: How hidden states and gradients travel.
        trains: Whether dL/dh comes back; a device that computes forward only gets none.
    """
    profile = problem.profile(device)
    up, down = profile.up_bytes_per_s, profile.down_bytes_per_s
    if up is None or down is None:
        return None
    sizes = _link_bytes(problem, problem.micro_batch(device), codec)
    # There and back once for h and dL/dh; with the tail on the device once more for its ends.
    seconds = sizes.hidden / up + (profile.round_trip_s or 0.0)
    seconds += sizes.gradient / down if trains else 0.0
    if problem.config.labels == "device":
        seconds += sizes.back / up + (profile.round_trip_s or 0.0) + sizes.ends / down
    return seconds


class _LinkBytes(NamedTuple):
    """Bytes of the tensors of a micro-batch."""

    hidden: int
    gradient: int
    ends: int
    """Final hidden states."""
    back: int
    """Their gradients."""


def _link_bytes(problem: PlanningProblem, micro_batch: int, codec: str) -> _LinkBytes:
    def make() -> _LinkBytes:
        top = find(plain(codec, WHOLE)).bytes_per_number
        back = find(plain(codec, TOP_GRADIENT)).bytes_per_number
        widths = (*_codec_bytes(codec), top, back)
        model, length = problem.model, problem.length
        return _LinkBytes(*(hidden_bytes(model, micro_batch, length, width) for width in widths))

    return problem.known.of(("link", micro_batch, codec), make)


def server_seconds(problem: PlanningProblem, device: str, split: int, ranks: Ranks) -> float | None:
    """Return the coordinator's seconds for a device's rows; None where its speed is unknown."""
    if split == problem.num_blocks:
        return 0.0
    speed, codec = problem.server_speed, codec_of(problem, device, split)
    return None if speed is None else _rows_flops(problem, device, split, ranks, codec) / speed


def _rows_flops(
    problem: PlanningProblem, device: str, split: int, ranks: Ranks, codec: str
) -> float:
    if split == problem.num_blocks:
        return 0.0
    work = _server_work(problem, device, split, ranks, codec)
    return estimate_flops(problem.model, work, problem.known).total


def _codec_bytes(codec: str) -> tuple[float, float]:
    """Return the bytes of a number of a hidden state, and of a gradient."""
    change = CHANGE if codec == RESIDUAL else codec
    return find(change).bytes_per_number, find(plain(codec, GRADIENT)).bytes_per_number


def _buffer_bytes(codec: str) -> float:
    """Return the bytes of a number of a hidden state while it is written or read.

    Beside a change in float32 lie what it starts from, and what the other side makes of it.
    """
    return 12.0 if codec == RESIDUAL else find(codec).bytes_per_number


def codec_of(problem: PlanningProblem, device: str, split: int) -> str:
    """Return how a device's hidden states and gradients travel at a split.

    With `auto` as exactly as the link carries in LINK_SHARE of the time in which the device
    computes; changes of what is held only where there is memory for that, and rounds have a
    barrier.
    """
    codec = problem.settings(device).codec
    assert codec is not None, "settings fill in every field"
    if codec != AUTO:
        return codec
    found = problem.codecs.get((device, split))
    if found is None:
        found = problem.codecs[device, split] = _find_codec(problem, device, split)
    return found


def _find_codec(problem: PlanningProblem, device: str, split: int) -> str:
    codec = RESIDUAL
    for name, share in _link_shares(problem, device, split):
        if share is None:
            return UNKNOWN_CODEC
        if share <= LINK_SHARE:
            codec = name
            break
    if codec == RESIDUAL:
        one = _at_split(problem, device, split, UNKNOWN_CODEC)
        least = one.memory_bytes + _overhead(problem, device)
        is_too_much = least + problem.config.held_bytes > problem.limit_bytes(device)
        if is_too_much or problem.config.round_mode == "buffered":
            return UNKNOWN_CODEC
    return codec


def link_shares(problem: PlanningProblem, device: str, split: int) -> dict[str, float] | None:
    """Return a device's seconds on the link beside those in which it computes, by codec.

    None where its speed or link is unknown.
    """
    shares = dict(_link_shares(problem, device, split))
    known = {name: share for name, share in shares.items() if share is not None}
    return known if len(known) == len(shares) else None


def _link_shares(
    problem: PlanningProblem, device: str, split: int
) -> Iterator[tuple[str, float | None]]:
    """Yield what `link_shares` returns, codec by codec; None for what is unknown."""
    speed = problem.profile(device).flops_per_s if device in problem.profiles else None
    one = _at_split(problem, device, split, UNKNOWN_CODEC)
    for name in AUTO_CODECS:
        if speed is None:
            yield name, None
            continue
        link_s = link_seconds(problem, device, name, trains=one.trains)
        yield name, None if link_s is None else link_s / (one.flops / speed)


# ---- tables ----


def options(problem: PlanningProblem, device: str) -> list[Option]:
    """Return what each split of a device that the model allows costs, with the least ranks.

    Times are None throughout where the device's speed or link is unknown.
    """

    def make() -> list[Option]:
        rows = [_option(problem, device, split) for split in problem.cuts]
        is_timed = all(row.device_s is not None for row in rows)
        return rows if is_timed else [replace(row, device_s=None) for row in rows]

    return problem.option_table(device, make)


def _option(problem: PlanningProblem, device: str, split: int) -> Option:
    codec, speed = codec_of(problem, device, split), problem.server_speed
    one = _at_split(problem, device, split, codec)
    base = one.memory_bytes + _overhead(problem, device) + one.held_bytes - one.adapters_bytes
    return Option(
        split,
        base + min(one.adapters_bytes, _cap(problem, device)),
        _seconds(problem, device, split, one.flops, trains=one.trains),
        one.rows_bytes,
        0.0 if speed is None else one.rows_flops / speed,
    )


def server_side(problem: PlanningProblem) -> Server:
    """Return the coordinator as the choice of splits sees it."""
    last = problem.num_blocks
    base = [
        server_base_bytes(problem, first, first_ranks(problem, SERVER, first, last))
        for first in range(last + 1)
    ]
    return Server(problem.limit_bytes(SERVER), base, problem.config.devices_per_round)


def adapter_budget(problem: PlanningProblem, device: str, split: int) -> float:
    """Return the bytes that a device has left for adapters at a split."""
    left = problem.limit_bytes(device) - device_base_bytes(problem, device, split)
    return min(left, _cap(problem, device))


def _cap(problem: PlanningProblem, device: str) -> float:
    cap = problem.config.planning.adapter_bytes
    return math.inf if cap is None or problem.pinned_rank(device) is not None else cap
