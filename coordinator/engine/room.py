"""Whether the coordinator's part fits the memory that is free, before anybody is greeted."""

from __future__ import annotations

from dataclasses import replace

from coordinator.engine.server_model import ServerModel
from coordinator.planning.fixed import plan_server
from coordinator.planning.objective import bytes_by_base, fitting_base
from coordinator.planning.problem import PlanningProblem
from edge_sdk.errors import DeviceError
from profiler.profile import DeviceProfile
from profiler.sensors.memory import return_freed

GIB = 2**30
ANY = "a device"
"""Name of a device that the config need not name: it runs what `default` says."""


def require_room(model: ServerModel) -> None:
    """Refuse a run whose coordinator cannot hold its part and the rows of one device.

    Its part is what it holds before any device has a plan, as `ServerModel.planned_engine` does.

    Raises:
        DeviceError: it cannot; the line says what it needs, what is there and what would fit.
    """
    problem = replace(model.problem(), profiles={ANY: DeviceProfile()})
    return_freed()  # what a block of this size keeps was looked at
    config, has = problem.config, problem.server.memory_bytes
    if has is None:
        return
    ranks = plan_server(config, model.facts, model.first)
    needs = bytes_by_base(problem, {ANY: model.first}, ranks)
    if needs[config.base] <= has:
        return
    fitting = fitting_base(needs, has)
    if fitting is not None:
        cure = f"base: {fitting[0]} would fit: {_gib(fitting[1])}"
    else:
        least = min(needs, key=needs.__getitem__)
        cure = (
            f"no base would fit, {least} needs {_gib(needs[least])}; leave the coordinator fewer "
            "blocks (default.split), or smaller micro-batches"
        )
    own = f"base: {config.base} needs {_gib(needs[config.base])}"
    raise DeviceError(
        f"memory: {own} for {_held(problem, model.first)}, {_gib(has)} are free; {cure}"
    )


def _held(problem: PlanningProblem, first: int) -> str:
    if problem.config.holds_all:
        return "the whole model, which evaluates here"
    return f"blocks {first + 1}-{problem.num_blocks} of {problem.num_blocks}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"
