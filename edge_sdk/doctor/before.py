"""`edge-sdk check`: whether this device could take part, looked at before anybody is greeted.

Config, keys, data and the way to the coordinator as the doctor looks at them, the data to its end;
then which blocks of the model would fit. No session is opened and nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from edge_sdk.client.backends import choose_backend
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.offer.base_choice import choose, with_base
from edge_sdk.client.profile import overlaid
from edge_sdk.doctor import config as written
from edge_sdk.doctor.examine import Question, check_backend, look_at_link
from edge_sdk.doctor.finding import Finding, failure, ok, skipped, warning
from edge_sdk.errors import DataError, DeviceError, EdgeError, ModelError, RefusedError, one_line
from edge_sdk.lora.targets import LoraConfig, find_targets, stretches
from edge_sdk.model.kept.part_cache import PartCache
from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import estimate_memory, hidden_bytes
from profiler.estimate.sizes import ModelShape, Work
from profiler.profile import DeviceProfile
from profiler.sensors.memory import rss
from profiler.sensors.memory_budget import budget
from profiler.sensors.sources import HERE, Sources

MIB = 2**20
# A bfloat16 number on the wire, as a run has it where nothing else is set.
WIRE_BYTES = 2.0
_CODES = {"data": DataError, "memory": DeviceError, "model": ModelError, "accept": RefusedError}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The run that is supposed, as the coordinator alone knows the real one."""

    model: str | None = None
    """Folder or hub id; None: that of the config, else what the last run has left here."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    micro_batch: int = 8
    """Sequences that pass through the model together."""
    length: int = 512
    """Tokens of the longest of them; the model's positions where these are fewer."""
    rank: int = 8
    """Rank of every adapter."""
    profile: DeviceProfile = DeviceProfile()
    """What was measured of this device; the config's own `profile` wins."""


def exit_code(findings: list[Finding]) -> int:
    """Return 0, or the code with which a run would end by the first failure; else 2, or 3."""
    failed = [one.check for one in findings if one.status == "failure"]
    if not failed:
        return 0
    link = ("name", "reach", "mtu", "handshake")
    return _CODES[failed[0]].exit_code if failed[0] in _CODES else 3 if failed[0] in link else 2


def look(question: Question, step: Step, sources: Sources = HERE) -> Iterator[Finding]:
    """Yield what each check has found, as soon as it is known."""
    config, read = written.read_config(
        question.config, question.overrides, question.env, question.env_prefix
    )
    yield read
    if config is None:
        return
    yield written.check_keys(config.secret_key, config.server_key)
    yield written.check_data(config.data, most_rows=None)
    backend = check_backend(config, sources)
    yield backend
    if backend.status == "failure":
        yield skipped("model", "needs backend")
    else:
        yield from look_at_model(config, step, sources)
    yield from look_at_link(config, sources)


def look_at_model(config: ClientConfig, step: Step, sources: Sources = HERE) -> Iterator[Finding]:
    """Say where the model can be cut, and how many of its blocks fit this device."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        yield skipped("model", "without torch here: `coordinator check --model` looks at it")
        return
    from edge_sdk.model.layout import find_layout, usable_positions
    from edge_sdk.model.shape import model_shape
    from edge_sdk.model.weights import load_config

    folder = _folder(config, step.model)
    if folder is None:
        yield skipped("model", "no run has left one here yet", "edge-sdk check --model FOLDER")
        return
    try:
        settings = load_config(folder, 2 if step.task == "sequence-classification" else 0)
        layout = find_layout(settings, step.task)
        targets = find_targets(settings, step.task, layout, LoraConfig())
        shape = model_shape(settings, step.task, layout)
    except EdgeError as error:
        yield failure("model", one_line(error))
        return
    cuts = f"{stretches(layout.cuts)} of {layout.num_blocks} blocks can run here"
    yield ok("model", f"{folder}: {settings.model_type}; {cuts}")
    length = min(step.length, usable_positions(settings, step.task))
    works = {cut: _work(config, step, shape, set(targets), cut, length) for cut in layout.cuts}
    yield from _costs(config, step, shape, works, sources)


def _folder(config: ClientConfig, model: str | None) -> Path | None:
    """Return where the model's config lies; None where nothing names one."""
    from edge_sdk.model.weights import locate

    wanted = model or config.model
    if wanted is not None:
        return locate(wanted)
    left = PartCache(config.cache).folder.glob("*.files")
    return max(left, key=lambda path: path.stat().st_mtime, default=None)


def _work(
    config: ClientConfig,
    step: Step,
    shape: ModelShape,
    targets: set[str],
    split: int,
    length: int,
) -> Work:
    own = overlaid(choose_backend(config).memory_model(config), config.profile)
    path = f"{shape.blocks_path}."
    ranks = {
        name: step.rank
        for name in targets
        if int(name.removeprefix(path).partition(".")[0]) < split
    }
    return Work(
        first=0,
        stop=split,
        has_front=True,
        has_tail=True,  # as with `labels: device`, where it needs more
        ranks=ranks,
        micro_batch=step.micro_batch,
        length=length,
        base_bytes=int(own.base_bytes or 4),
        compute_bytes=int(own.compute_bytes or 4),
        linear_bytes=own.linear_bytes,
        recompute=own.recompute or "none",
    )


def _costs(
    config: ClientConfig,
    step: Step,
    shape: ModelShape,
    works: Mapping[int, Work],
    sources: Sources,
) -> Iterator[Finding]:
    """Say what fits, what a micro-batch sends, and how long its own blocks take."""
    profile = overlaid(step.profile, config.profile)
    overhead = int(profile.overhead_bytes or rss(sources.root).value or 0)
    try:
        have = profile.memory_bytes or budget(sources).value
    except ValueError as error:
        yield failure("memory", f"profile.{error}", "profile.memory_bytes=null")
        return
    if config.base == "auto" and "int8" in choose_backend(config).bases:
        # A planned run knows no micro-batch yet when a device chooses.
        choice = choose(shape, replace(works[max(works)], micro_batch=1), have, overhead)
        yield ok("base", f"auto would be {choice.base}: {choice.reason}")
        works = {cut: with_base(work, choice.base) for cut, work in works.items()}
    needs = {cut: estimate_memory(shape, work, overhead).total for cut, work in works.items()}
    deepest = _deepest(needs, have)
    yield _memory(config, step, needs, have, deepest)
    work = works[deepest or min(works)]
    sent = hidden_bytes(shape, step.micro_batch, work.length, WIRE_BYTES) / 1e6
    yield ok("bytes", f"{sent:,.2f} MB each way for a micro-batch, twice that with labels: device")
    if profile.flops_per_s is None:
        cure = "profiler measure --model FOLDER --write me.json, then --profile me.json"
        yield skipped("time", "no profile tells the speed of this device", cure)
        return
    seconds = estimate_flops(shape, work).total / profile.flops_per_s
    yield ok("time", f"{seconds:.2g} s of computing for a micro-batch with {work.stop} blocks here")


def _deepest(needs: Mapping[int, float], have: float | None) -> int | None:
    """Return the most blocks that fit; None where none do."""
    fitting = [cut for cut, size in needs.items() if have is None or size <= have]
    return max(fitting, default=None)


def _memory(
    config: ClientConfig,
    step: Step,
    needs: Mapping[int, float],
    have: float | None,
    deepest: int | None,
) -> Finding:
    least, what = min(needs), f"{step.micro_batch} sequences, rank {step.rank}"
    room = "an unknown budget" if have is None else f"{have / MIB:,.0f} MiB"
    if deepest is None:
        text = f"{least} blocks need {needs[least] / MIB:,.0f} MiB of {room} ({what})"
        return failure("memory", text, "fewer sequences or ranks; base=int8; free memory")
    text = f"up to {deepest} blocks fit: {needs[deepest] / MIB:,.0f} MiB of {room} ({what})"
    wanted = max(needs) if config.accept.min_split == "all" else config.accept.min_split
    if wanted > deepest:
        cure = "a smaller accept.min_split, or base=int8"
        return warning("memory", f"{text}; accept.min_split is {config.accept.min_split}", cure)
    return ok("memory", text)
