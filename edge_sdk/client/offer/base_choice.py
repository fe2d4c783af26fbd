"""`base: auto`: float32 weights where they fit, int8 where memory asks for it, and why.

`choose` decides from sizes alone. What is decided stays for the run: a device that is started again
reads it where it was written, so that it goes on with the same numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edge_sdk.errors import EdgeError
from edge_sdk.files import atomic_write
from edge_sdk.model.precision import Base, base_widths
from edge_sdk.protocol.messages import Welcome
from edge_sdk.protocol.plan import Plan
from profiler.estimate.memory import estimate_memory
from profiler.estimate.sizes import ModelShape, Work
from profiler.profile import DeviceProfile

log = logging.getLogger(__name__)

NOTE = "base.json"
"""Where the choice is kept, in the folder of a run."""
# Share of the budget that float32 weights may fill: estimates are a few per cent wrong, and a
# residual grows beside the weights.
MOST_SHARE = 0.9
MIB = 2**20


class BaseChoice(NamedTuple):
    """How frozen weights are kept, and why."""

    base: Base
    reason: str


def choose(
    shape: ModelShape, work: Work, have_bytes: float | None, overhead_bytes: float
) -> BaseChoice:
    """Return float32 if *work* fits into *have_bytes* with it, else int8.

    Args:
        shape: Sizes of the model.
        work: What the device will do, its frozen weights in float32.
        have_bytes: What the run may use; None: nobody knows.
        overhead_bytes: What the process takes without a model.
    """
    overhead = int(overhead_bytes)
    full = estimate_memory(shape, work, overhead).total / MIB
    blocks = f"{work.stop - work.first} of {shape.num_blocks} blocks"
    if have_bytes is None:
        return BaseChoice("float32", f"{blocks} take {full:,.0f} MiB; the budget is unknown")
    told = f"{blocks} take {full:,.0f} MiB in float32, of {have_bytes / MIB:,.0f} MiB for the run"
    if full <= MOST_SHARE * have_bytes / MIB:
        return BaseChoice("float32", told)
    packed = estimate_memory(shape, with_base(work, "int8"), overhead).total / MIB
    return BaseChoice("int8", f"{told}; {packed:,.0f} MiB in int8")


def with_base(work: Work, base: Base) -> Work:
    """Return the same work with frozen weights kept as *base*."""
    base_bytes, linear_bytes = base_widths(base)
    return replace(work, base_bytes=base_bytes, linear_bytes=linear_bytes)


def work_of(
    welcome: Welcome, shape: ModelShape, targets: Mapping[str, Any], own: DeviceProfile, plan: Plan
) -> Work:
    """Return what *plan* asks of this device."""
    return Work(
        first=0,
        stop=plan.split,
        has_front=True,
        has_tail=plan.tail or plan.split == shape.num_blocks,
        ranks={name: plan.ranks.get(name, 0) for name in targets},
        micro_batch=plan.micro_batch,
        length=welcome.max_length,
        compute_bytes=int(own.compute_bytes or 4),
        recompute=own.recompute or "none",
        in_flight=plan.in_flight,
        trains_head=plan.tail and welcome.num_labels > 0,
    )


def supposed_plan(
    welcome: Welcome, shape: ModelShape, targets: Mapping[str, Any], rank: int
) -> Plan:
    """Return the plan that a device with all the memory of the world would have.

    The real one waits for what this device says of itself, its choice among it. One sequence at a
    time: where a micro-batch has more, it is memory that decides how many.
    """
    return Plan(
        split=shape.num_blocks,
        ranks=dict.fromkeys(targets, rank),
        alphas={},
        batch_size=1,
        micro_batch=1,
        tail=welcome.labels == "device",
    )


def decide(
    files: Path, welcome: Welcome, own: DeviceProfile, rank: int, plan: Plan | None
) -> BaseChoice:
    """Look at the model in *files* and choose.

    Args:
        files: Folder with the model's config.
        welcome: The run.
        own: Memory of this device, and how it computes.
        rank: Rank of the run's adapters.
        plan: What the device is to run; None: that is not known yet.
    """
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.shape import model_shape
    from edge_sdk.model.weights import load_config
    from edge_sdk.runtime.training import from_pairs

    task: Any = welcome.task
    try:
        config = load_config(files, welcome.num_labels)
        layout = find_layout(config, task)
        shape = model_shape(config, task, layout)
        targets = find_targets(config, task, layout, from_pairs(LoraConfig, welcome.lora))
    except EdgeError as error:  # the run itself will say so; until then nothing changes
        return BaseChoice("float32", f"the model's sizes are unknown: {error}")
    supposed = plan or supposed_plan(welcome, shape, targets, rank)
    work = work_of(welcome, shape, targets, own, supposed)
    return choose(shape, work, own.memory_bytes, own.overhead_bytes or 0.0)


def kept_choice(folder: Path) -> BaseChoice | None:
    """Return what an earlier start of this device has chosen in a run; None where it has not."""
    try:
        found = json.loads((folder / NOTE).read_bytes())
        base, reason = found["base"], found["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if base not in ("float32", "int8") or not isinstance(reason, str):
        return None
    return BaseChoice(base, reason)


def keep_choice(folder: Path, choice: BaseChoice) -> None:
    """Write *choice* down for the next start.

    Raises:
        StorageError: it cannot be written.
    """
    atomic_write(folder / NOTE, json.dumps(choice._asdict()), what="the choice of `base`")
