"""The `profiler` command: what this device is, what it measures, what it does now.

Exit codes: 0 done, 1 a library is missing, 2 wrong arguments, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from profiler import completion
from profiler.measure import BlockMeasure, gemm_rates, measure_block, measure_profile
from profiler.profile import DeviceProfile
from profiler.sensors.load import cpu_times
from profiler.sensors.overview import Group, overview
from profiler.sensors.readings import NOT_KNOWN, Fact, Reading, amount
from profiler.sensors.sources import HERE

# Long enough for a hundred scheduler ticks, short enough for somebody who waits.
LOAD_WINDOW_S = 0.25
# Most values fit; a longer one pushes its source to the right.
VALUE_WIDTH = 22
UNKNOWN_TITLE = "unknown here"
MISSING_EXIT_CODE, USAGE_EXIT_CODE, INTERRUPTED_EXIT_CODE = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `profiler` command and return its exit code."""
    parser = _parser()
    completion.answer(parser)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except (ValueError, OSError) as error:
        print(f"profiler: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    except ModuleNotFoundError as error:
        print(f"profiler: {error}; pip install 'edgesplit[torch]'", file=sys.stderr)
        return MISSING_EXIT_CODE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="profiler", description="What this device can do.")
    parser.add_argument("-V", "--version", action="version", version=metadata.version("edgesplit"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="print what is known now, each value with its source")
    show.set_defaults(run=_show)

    measure = commands.add_parser("measure", help="measure speed and memory; needs torch")
    measure.add_argument("--model", type=Path, help="folder with a config.json: time one block")
    measure.add_argument("--rows", type=_positive, default=4, help="sequences of the block")
    measure.add_argument("--length", type=_positive, default=128, help="their positions")
    measure.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    measure.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    measure.add_argument("--memory-bytes", type=float, help="a budget set by hand")
    measure.add_argument(
        "--write", type=Path, metavar="FILE", help="also write the profile, for `coordinator plan`"
    )
    measure.set_defaults(run=_measure)

    watch = commands.add_parser("watch", help="a live view until Ctrl-C")
    watch.add_argument("--interval", type=float, default=1.0, help="seconds, default: %(default)s")
    number = watch.add_mutually_exclusive_group()
    number.add_argument("--count", type=_positive, help="stop after so many views")
    number.add_argument("--once", dest="count", action="store_const", const=1, help="one view")
    watch.set_defaults(run=_watch)

    for command, examples in (
        (show, ("show", "show --format json")),
        (measure, ("measure", "measure --model examples/base --write kitchen.json")),
        (watch, ("watch", "watch --once", "watch --interval 5 --format json")),
    ):
        command.epilog = "\n".join(["examples:", *(f"  profiler {line}" for line in examples)])
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument(
            "--format", choices=("text", "json"), default="text", help="default: %(default)s"
        )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _show(options: argparse.Namespace) -> None:
    before = cpu_times(HERE)
    time.sleep(LOAD_WINDOW_S)
    groups = overview(HERE, before)
    groups["device"] |= {
        "python": Fact(platform.python_version(), "platform"),
        "platform": Fact(platform.platform(), "platform"),
    }
    _print_json(groups) if options.format == "json" else _print(groups)


def _measure(options: argparse.Namespace) -> None:
    import torch  # its libraries belong to the overhead

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU that it can use")
    if options.model is not None:
        from transformers import AutoConfig, AutoModel  # noqa: F401 - loaded, likewise
    profile = measure_profile(device=device, memory_bytes=options.memory_bytes)
    groups: dict[str, Group] = {}
    if options.model is not None:
        shape = {"rows": options.rows, "length": options.length}
        block = measure_block(options.model, **shape, dtype=options.dtype, device=device)
        profile = replace(profile, flops_per_s=block.flops_per_s.value)
        groups["one block, forward and backward"] = _block(block)
    groups["matrix products"] = dict(gemm_rates(device))
    if options.write is not None:
        options.write.write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")
    if options.format == "json":
        _print_json({**groups, "profile": asdict(profile)})
    else:
        _print({**groups, "profile": _profile(profile, device)})


def _block(block: BlockMeasure) -> Group:
    return {
        "seconds": block.seconds,
        "operations": Reading(block.flops, "counted by torch", "FLOP"),
        "speed": block.flops_per_s,
        "weights": Reading(block.weight_bytes, "counted", "B"),
        "peak_beyond_weights": block.peak_bytes,
    }


def _profile(profile: DeviceProfile, device: str) -> Group:
    return {
        "memory_budget": Reading(profile.memory_bytes, f"for a run on {device}", "B"),
        "memory_total": Reading(profile.total_memory_bytes, f"for a run on {device}", "B"),
        "overhead": Reading(profile.overhead_bytes, "libraries without a model", "B"),
        "link": Fact(None, "measured when the device joins a coordinator"),
    }


def _watch(options: argparse.Namespace) -> None:
    from profiler.live_view import watch

    if not options.interval > 0:
        raise ValueError(f"--interval must be above 0, got {options.interval}")
    watch(count=options.count, interval_s=options.interval, as_json=options.format == "json")


def _print_json(groups: dict[str, Any]) -> None:
    plain = {
        title: {name: _plain(one) for name, one in known.items()} for title, known in groups.items()
    }
    print(json.dumps(plain, indent=2))


def _plain(one: Any) -> Any:
    return one._asdict() if isinstance(one, Reading | Fact) else one


def _print(groups: dict[str, Group]) -> None:
    names = [name for known in groups.values() for name in known]
    wide = max(len(name) for name in [*names, UNKNOWN_TITLE]) + 2
    for number, (title, known) in enumerate(groups.items()):
        print(("\n" if number else "") + title)
        unknown = [n for n, one in known.items() if (one.value, one.source) == (None, NOT_KNOWN)]
        for name, one in known.items():
            if name not in unknown:
                mark = " (estimate)" if isinstance(one, Reading) and one.estimated else ""
                print(f"  {name:<{wide}}{amount(one):<{VALUE_WIDTH}}  {one.source}{mark}")
        if unknown:
            print(
                textwrap.fill(
                    f"{UNKNOWN_TITLE:<{wide}}{', '.join(unknown)}",
                    width=100,
                    initial_indent="  ",
                    subsequent_indent=" " * (wide + 2),
                )
            )
