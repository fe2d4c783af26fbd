"""`coordinator plan`: what the planner would decide for given devices, and why; nothing is run.

It reads the model's config, never its weights, and knows no network and no run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coordinator.aggregation.buffer import expected_staleness
from coordinator.commands.readiness.devices import add_devices, read_devices
from coordinator.commands.readiness.forecast import forecast
from coordinator.config.presets import load_serve_config
from coordinator.planning.problem_files import read_problem
from edge_sdk.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from rich.table import Table

    from coordinator.config.run import ServeConfig
    from coordinator.planning.plan_set import DeviceExplanation, PlanSet, ServerExplanation
    from coordinator.planning.problem import PlanningProblem

MIB = 2**20


def add_plan(commands: Any) -> None:  # noqa: ANN401 - argparse keeps the type to itself
    """Register the command with the parser of `coordinator`."""
    text = "show which split and ranks each device would get"
    parser: argparse.ArgumentParser = commands.add_parser("plan", help=text, description=text)
    parser.set_defaults(run=run_plan)
    parser.add_argument("--config", type=Path, help="YAML file of the run")
    parser.add_argument("--preset", metavar="NAME", help="a method; see `coordinator presets list`")
    add_devices(parser)
    parser.add_argument("--importance", type=Path, help="JSON file: importance by weight name")
    parser.add_argument("--explain", action="store_true", help="print the numbers of every split")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan; the exit code is 0 if some device can take part and all plans fit."""
    from coordinator.planning.joint import plan_all

    config = load_serve_config(options.config, options.overrides, preset=options.preset)
    if config.trained_by != "devices":
        raise ConfigError("trained_by: the coordinator trains alone, there is nothing to plan")
    assumed = read_devices(options)
    if not assumed.devices:
        raise ConfigError("plan for which devices? give --profiles FILE, or --board BOARD")
    problem = read_problem(assumed.settings(config), assumed.devices, options.importance)
    found = plan_all(problem)
    if options.format == "json":
        sys.stdout.write(json.dumps(_as_json(found), indent=2, allow_nan=False) + "\n")
    else:
        _print_text(problem, found, explain=options.explain)
    for line in (short := too_large(found)):
        sys.stderr.write(f"coordinator: {line}\n")
    if not found.plans:
        return ConfigError.exit_code
    return DeviceError.exit_code if short else 0


def too_large(found: PlanSet) -> list[str]:
    """Return who would need more memory than there is, by split points that somebody has fixed."""
    sides: dict[str, DeviceExplanation | ServerExplanation] = {
        **found.explanation.devices,
        "the coordinator": found.explanation.server,
    }
    return [
        f"{name} would need {_mib(side.planned_bytes)} MiB of {_mib(side.budget_bytes)}"
        for name, side in sides.items()
        if side.planned_bytes > side.budget_bytes
    ]


# ---- writing ----


def _as_json(found: PlanSet) -> Any:  # noqa: ANN401 - plain lists, objects and numbers
    """Return the whole plan with its explanation; what is unknown is null."""
    return _finite(dataclasses.asdict(found))


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_text(problem: PlanningProblem, found: PlanSet, *, explain: bool) -> None:
    from rich.console import Console

    out = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    if problem.coverage is not None:
        out.print(problem.coverage.text)
    out.print(_overview(problem, found))
    for device, plan in found.plans.items():
        out.print(f"{device}: adapters")
        for line in _rank_lines(problem, plan.ranks):
            out.print(f"  {line}")
        if explain:
            story = found.explanation.devices[device]
            out.print(_options_table(problem, story, plan.split, found.wave_s))
    if found.server_ranks:
        out.print("coordinator: adapters")
        for line in _rank_lines(problem, found.server_ranks):
            out.print(f"  {line}")
    for device, reason in found.refused.items():
        out.print(f"{device}: refused, {reason}")
    told = forecast(problem, found)
    unknown = [f"time unknown: {what}" for what in told.unknown]
    sizes = ", ".join(f"{base} {_mib(size)}" for base, size in told.server_bases.items())
    bases = f"coordinator, base: {problem.config.base}; MiB by base: {sizes}"
    for note in (*_all_notes(found), bases, *_tempo_notes(problem.config, found), *unknown):
        out.print(f"note: {note}")


def _overview(problem: PlanningProblem, found: PlanSet) -> Table:
    """Make a row for each device and one for the coordinator."""
    headings = ("", "blocks", "bound by", "MiB", "of MiB", "adapters", "wave s")
    table = _table(headings, num_text=3)
    for device, story in found.explanation.devices.items():
        table.add_row(
            device,
            _span(0, found.plans[device].split - 1),
            story.binding,
            _mib(story.planned_bytes),
            _mib(story.budget_bytes),
            _mib(story.adapter_bytes),
            _seconds(story.device_s),
        )
    server, last = found.explanation.server, problem.num_blocks - 1
    table.add_row(
        "coordinator",
        _span(server.first, last) if server.first <= last else "none",
        "",
        _mib(server.planned_bytes),
        _mib(server.budget_bytes),
        _mib(server.adapter_bytes),
        _seconds(server.server_s),
    )
    table.add_row("wave", "", "", "", "", "", _seconds(found.wave_s))
    return table


def _options_table(
    problem: PlanningProblem, story: DeviceExplanation, split: int, wave_s: float | None
) -> Table:
    """List every split of a device, and what rules it out."""
    headings = ("split", "", "device MiB", "s", "coordinator MiB", "s")
    table = _table(headings, num_text=2)
    for cut in problem.facts.layout.cuts:
        if cut < problem.config.planning.min_split:
            table.add_row(str(cut), "min_split", "", "", "", "")
    for option in story.options:
        late = wave_s is not None and option.device_s is not None and option.device_s > wave_s
        verdict = "memory" if option.device_bytes > story.budget_bytes else "time" if late else ""
        table.add_row(
            str(option.split),
            "chosen" if option.split == split else verdict,
            _mib(option.device_bytes),
            _seconds(option.device_s),
            _mib(option.server_bytes),
            _seconds(None if story.server_s is None else option.server_s),
        )
    return table


def _table(headings: Sequence[str], num_text: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if index < num_text else "right"
        # A long name goes on in the next line; a number is never cut.
        table.add_column(heading, justify=justify, no_wrap=index > 0, overflow="fold")
    return table


def _rank_lines(problem: PlanningProblem, ranks: Mapping[str, int]) -> list[str]:
    """Write `attn.q_proj  1-4: 8, 5: 2`: ranks by kind of weight and block, one line if equal."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for name, rank in ranks.items():
        block = problem.facts.block_of(name)
        kind = name.removeprefix(f"{problem.facts.layout.blocks_path}.{block}.")
        kinds.setdefault(kind, []).append((block, rank))
    texts = {kind: _stretches(found) for kind, found in kinds.items()}
    if len(texts) > 1 and len(set(texts.values())) == 1:
        texts = {f"all {len(texts)} kinds of weight": next(iter(texts.values()))}
    width = max(map(len, texts), default=0)
    return [f"{kind:<{width}}  {text}" for kind, text in texts.items()]


def _stretches(ranks: Iterable[tuple[int, int]]) -> str:
    """Write (block, rank) pairs as `1-4: 8, 5: 2`; pairs count blocks from 0."""
    runs = []
    for rank, group in itertools.groupby(sorted(ranks), key=lambda pair: pair[1]):
        blocks = [block for block, _ in group]
        runs.append(f"{_span(blocks[0], blocks[-1])}: {rank}")
    return ", ".join(runs)


def _span(first: int, last: int) -> str:
    """Write blocks that are counted from 0 as people count them, from 1."""
    return f"{first + 1}-{last + 1}" if first < last else f"{first + 1}"


def _all_notes(found: PlanSet) -> list[str]:
    notes = list(found.explanation.notes)
    for device, story in found.explanation.devices.items():
        notes += [f"{device}: {note}" for note in story.notes]
    return notes


def _tempo_notes(config: ServeConfig, found: PlanSet) -> list[str]:
    """Say how far behind each device would be where nobody waits for anybody."""
    stories = found.explanation.devices.items()
    waves = {d: found.plans[d].batch_size / found.plans[d].micro_batch for d, _ in stories}
    seconds = {d: waves[d] * story.device_s for d, story in stories if story.device_s}
    if config.round_mode != "buffered" or len(seconds) < len(waves):
        return []
    own = config.buffered
    ages = expected_staleness(seconds, own.size or len(seconds))
    too_old = {d: "; more than max_staleness" for d, age in ages.items() if age > own.max_staleness}
    return [
        f"{device}: about {age:.1f} merges behind{too_old.get(device, '')}"
        for device, age in ages.items()
    ]


def _mib(num_bytes: float) -> str:
    if not math.isfinite(num_bytes):
        return "unknown"
    # The model of a test takes less than a MiB; elsewhere a decimal is noise.
    return f"{num_bytes / MIB:,.{0 if num_bytes >= 10 * MIB else 1}f}"


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.3g}"
