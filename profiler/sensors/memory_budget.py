"""How much memory a run may take here, what is left beside it, and what else could be used up.

On a board with unified memory all of that is one pool, whichever processor computes.
"""

from __future__ import annotations

import math

from profiler.sensors.board import unified_memory
from profiler.sensors.kernel_files import read_text
from profiler.sensors.memory import field_bytes, memory_info, rss
from profiler.sensors.readings import MemoryInfo, Reading, unknown
from profiler.sensors.sources import HERE, Sources

MIB = 2**20
# Left to others and to mistakes of the estimate: a share of the pool within two bounds. Less than
# the lower one is taken by a package update, more than the upper one is waste on a large board.
RESERVE_SHARE = 0.05
LEAST_RESERVE_BYTES = 128 * MIB
MOST_RESERVE_BYTES = 1024 * MIB


def gpu_memory(sources: Sources = HERE) -> MemoryInfo:
    """Read the memory of a GPU that has its own; unknown for one that shares the CPU's."""
    info = sources.nvml.ask("nvmlDeviceGetMemoryInfo")
    if info is not None and not unified_memory(sources).value:
        return MemoryInfo(Reading(info.total, "NVML", "B"), Reading(info.free, "NVML", "B"))
    cuda = sources.loaded_cuda()
    if cuda is not None and not unified_memory(sources).value:
        free, total = cuda.mem_get_info(0)
        return MemoryInfo(Reading(total, "torch", "B"), Reading(free, "torch", "B"))
    return MemoryInfo(unknown("B"), unknown("B"))


def gpu_memory_used(sources: Sources = HERE) -> Reading:
    """Read the memory that the GPU's programs hold, its own or the shared one."""
    total, free = gpu_memory(sources)
    if total.value is not None and free.value is not None:
        return Reading(total.value - free.value, total.source, "B")
    used = field_bytes(sources.root / "proc/meminfo", "NvMapMemUsed")
    return unknown("B") if used is None else Reading(used, "/proc/meminfo NvMapMemUsed", "B")


def swap(sources: Sources = HERE) -> dict[str, Reading]:
    """Read size and use of swap on disk and of zram, apart: zram takes memory to give memory."""
    sizes = {"swap": 0, "swap_used": 0, "zram": 0, "zram_used": 0}
    text = read_text(sources.root / "proc/swaps")
    if text is None:
        return {name: unknown("B") for name in sizes}
    for line in text.split("\n")[1:]:
        name, _, size, used = line.split()[:4]
        kind = "zram" if "/zram" in name else "swap"
        sizes[kind] += int(size) * 1024
        sizes[f"{kind}_used"] += int(used) * 1024
    return {name: Reading(size, "/proc/swaps", "B") for name, size in sizes.items()}


def pool(sources: Sources = HERE, *, on_gpu: bool = False) -> MemoryInfo:
    """Return the memory for the computation: the GPU's own, else this process's share."""
    own = gpu_memory(sources)
    return own if on_gpu and own.total.value is not None else memory_info(sources.root)


def held(sources: Sources = HERE, *, on_gpu: bool = False) -> Reading:
    """Return what this process holds of the pool already."""
    cuda = sources.loaded_cuda() if on_gpu else None
    on_card = 0.0 if cuda is None else float(cuda.memory_reserved(0))
    if on_gpu and gpu_memory(sources).total.value is not None:
        return Reading(on_card, "torch", "B")
    resident = rss(sources.root)
    if not on_card:
        return resident
    # CUDA memory of a Jetson does not appear in the resident set.
    return Reading((resident.value or 0.0) + on_card, f"{resident.source} + torch", "B")


def others(sources: Sources = HERE) -> Reading:
    """Return what everybody else holds of the memory that this process could use."""
    total, available = memory_info(sources.root)
    mine = rss(sources.root)
    if total.value is None or available.value is None or mine.value is None:
        return unknown("B")
    rest = max(0.0, total.value - available.value - mine.value)
    return Reading(rest, "total - available - this process", "B", estimated=True)


def reserve_bytes(total_bytes: float) -> float:
    """Return the memory that a run leaves alone on a machine of *total_bytes*."""
    return min(max(RESERVE_SHARE * total_bytes, LEAST_RESERVE_BYTES), MOST_RESERVE_BYTES)


def budget(
    sources: Sources = HERE, *, on_gpu: bool = False, by_hand: float | None = None
) -> Reading:
    """Return the memory that this process may have in all, what it holds now included.

    Args:
        sources: Where to look.
        on_gpu: Whether the GPU computes.
        by_hand: Bytes that a person has decided on; they are checked and taken.

    Raises:
        ValueError: *by_hand* is no number above 0, or more than the machine has.
    """
    total, available = pool(sources, on_gpu=on_gpu)
    if by_hand is not None:
        _check(by_hand, total)
        return Reading(by_hand, "set by hand", "B")
    if total.value is None or available.value is None:
        return unknown("B")
    mine = held(sources, on_gpu=on_gpu).value or 0.0
    left = max(0.0, available.value - reserve_bytes(total.value))
    return Reading(left + mine, f"{available.source}, less a reserve", "B")


def _check(by_hand: float, total: Reading) -> None:
    if not math.isfinite(by_hand) or by_hand <= 0:
        raise ValueError(f"memory_bytes must be above 0, got {by_hand}")
    if total.value is not None and by_hand > total.value:
        raise ValueError(
            f"memory_bytes is {by_hand:.0f} ({by_hand / MIB:,.0f} MiB), but there are only "
            f"{total.value:.0f} ({total.value / MIB:,.0f} MiB, {total.source}); "
            "lower it, or leave it out to have it measured"
        )
