"""Everything that can be known of this machine at this moment, in groups, each with its source.

For `profiler show`, for the live view and for tests of whole boards; nothing is measured here.
"""

from __future__ import annotations

from profiler.sensors.board import FACTS
from profiler.sensors.cgroup import allowed_cores
from profiler.sensors.heat import temperature, temperatures, throttling
from profiler.sensors.load import (
    CpuTimes,
    cpu_clock,
    cpu_clock_max,
    cpu_load,
    cpu_times,
    gpu_clock,
    gpu_clock_max,
    gpu_load,
)
from profiler.sensors.memory import memory_info, peak_rss, rss
from profiler.sensors.memory_budget import budget, gpu_memory, gpu_memory_used, others, swap
from profiler.sensors.power import gpu_power, power, rails
from profiler.sensors.readings import NOT_KNOWN, Fact, Reading, no_fact
from profiler.sensors.sources import HERE, Sources

Known = Reading | Fact
Group = dict[str, Known]


def overview(sources: Sources = HERE, since: CpuTimes | None = None) -> dict[str, Group]:
    """Return every reading and fact by group and name.

    Args:
        sources: Where to look.
        since: Processor times of a moment ago; without them the load of the CPU is unknown.
    """
    return {
        "device": {name: ask(sources) for name, ask in FACTS.items()},
        "memory": memory(sources),
        "compute": compute(sources, since),
        "power": draw(sources),
        "heat": heat(sources),
    }


def memory(sources: Sources = HERE) -> Group:
    """Read memory of the machine, of this process, of the GPU, and swap."""
    host, card = memory_info(sources.root), gpu_memory(sources)
    return {
        "memory_total": host.total,
        "memory_available": host.available,
        "memory_budget": budget(sources),
        "memory_others": others(sources),
        "process_rss": rss(sources.root),
        "process_peak_rss": peak_rss(sources.root),
        "gpu_memory_total": card.total,
        "gpu_memory_available": card.available,
        "gpu_memory_used": gpu_memory_used(sources),
        **swap(sources),
    }


def compute(sources: Sources = HERE, since: CpuTimes | None = None) -> Group:
    """Read cores, loads and clocks."""
    return {
        "cores": allowed_cores(sources.root),
        "cpu_load": cpu_load(since, cpu_times(sources)),
        "cpu_clock": cpu_clock(sources),
        "cpu_clock_max": cpu_clock_max(sources),
        "gpu_load": gpu_load(sources),
        "gpu_clock": gpu_clock(sources),
        "gpu_clock_max": gpu_clock_max(sources),
    }


def draw(sources: Sources = HERE) -> Group:
    """Read power as a whole, of the GPU, and of each rail."""
    found = rails(sources)
    each = {f"rail_{name}": reading for name, reading in found.items()}
    return {"power": power(sources, found), "gpu_power": gpu_power(sources, found), **each}


def heat(sources: Sources = HERE) -> Group:
    """Read temperatures, and evidence of throttling."""
    found, slow = temperatures(sources), throttling(sources)
    group: Group = {"temperature": temperature(found)}
    group |= {f"temperature_{name}": reading for name, reading in found.items()}
    if slow.source == NOT_KNOWN:
        return {**group, "throttling": no_fact()}
    group["throttling"] = Fact(", ".join(slow.now) or "none", slow.source)
    if slow.since_boot:
        group["throttled_since_boot"] = Fact(", ".join(slow.since_boot), slow.source)
    for name, count in slow.counts.items():
        group[f"events_{name}"] = Reading(count, slow.source, "events")
    return group
