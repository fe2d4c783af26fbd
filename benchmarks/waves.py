"""Waves of what is there against gathered ones: how near a run comes to its slowest resource.

    python benchmarks/waves.py [--devices 16] [--steps 10] [--cases server device link] [--smoke]

Simulated devices whose speeds lie between 1 - --spread and 1 + --spread of their mean, and differ
by as much from one micro-batch to the next (--jitter). Training is real, time is modelled, so that
the load of this machine changes no number. The bound of a run is the time in which the busiest of
all resources (coordinator, a device, a direction of a link) works without a pause; a share of 1.00
is a run that takes no longer. Each case makes another resource the busiest one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import header, save, table

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings
from coordinator.lab.simulation.boards import Board, Connection
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.run import simulate
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.training import TrainingConfig

ROOT = Path(__file__).parents[1]
DEVICE_FLOPS = 1e9
FAST = 1e15
# How long the coordinator, and the slowest link, take for what the slowest device does in 1 s.
CASES = {
    "device": (0.5, 0.3),
    "balanced": (0.95, 0.5),
    "server": (1.5, 0.3),
    "link": (0.5, 1.5),
}
WORDS = ("the", "red", "small", "boat", "river", "sees", "likes", "old", "house", "bird", "near")


class Speeds(NamedTuple):
    """What the machines of a case reach."""

    server_flops: float
    link_bytes: float


class Result(NamedTuple):
    """What a run has taken."""

    seconds: float
    busy: Mapping[str, float]
    """Seconds in which each resource worked."""
    loss: float


def write_rows(path: Path, rows: int) -> None:
    """Texts of 4 to 40 words."""
    lines = []
    for row in range(rows):
        length = 4 + (7 * row + row * row // 5) % 37
        words = (WORDS[(row * (place + 2) + place * place) % len(WORDS)] for place in range(length))
        lines.append(f'{{"text": "{" ".join(words)}"}}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(
    options: argparse.Namespace, folder: Path, waves: str, labels: str, speeds: Speeds
) -> Result:
    """One simulated run."""
    count, spread = options.devices, options.spread
    steps = [2 * number / max(1, count - 1) - 1 for number in range(count)]
    devices = {
        f"d{number:02}": SimulatedDeviceConfig(
            board="any", link="any", flops_per_s=DEVICE_FLOPS * (1 + spread * step)
        )
        for number, step in enumerate(steps)
    }
    mbit = speeds.link_bytes * 8 / 1e6
    fleet = FleetConfig(
        devices=devices,
        data=DataConfig(path=str(folder / "rows.jsonl"), too_long="cut"),
        boards={"any": Board(memory_gib=64, tflops=1, watts=10)},
        links={"any": Connection(down_mbit=mbit, up_mbit=mbit, rtt_ms=options.rtt_ms)},
        coordinator="any",
        jitter=options.jitter,
        threads=1,
        cache=folder / "cache",
    )
    micro = DeviceSettings(
        split=2,
        batch_size=2 * options.micro,
        micro_batch=2,
        in_flight=options.in_flight,
        codec="bfloat16",
    )
    settings: dict[str, Any] = {
        "model": str(ROOT / "examples" / "base"),
        "runs": folder / "runs",
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "max_length": 48,
        "default": micro,
        "lora": LoraConfig(r=4, lora_alpha=8),
        "training": TrainingConfig(optimizer="sgd", learning_rate=1e-2),
        "planning": PlanningConfig(server_flops_per_s=speeds.server_flops),
        "device": "cpu",
        "labels": labels,
        "waves": waves,
    }
    result = simulate(SimulationConfig(**settings, simulation=fleet), Watchers())
    return read(result.rounds[1:])


def read(rounds: Sequence[Any]) -> Result:
    """Add the rounds of a run up."""
    busy: dict[str, float] = {}
    for each in rounds:
        clock = each.clock
        parts = {"coordinator": clock["coordinator"]["compute_s"]}
        for name, device in clock["devices"].items():
            parts |= {name: device["compute_s"], f"{name} up": device["up_s"]}
            parts[f"{name} down"] = device["down_s"]
        busy = {name: busy.get(name, 0.0) + seconds for name, seconds in parts.items()}
    return Result(rounds[-1].seconds, busy, rounds[-1].metrics["train_loss"])


def measure(options: argparse.Namespace, folder: Path) -> list[list[str]]:
    """Every case, both kinds of waves, in rows of the table."""
    rows = []
    for labels in options.labels:
        # At known speeds: what there is to do.
        known = run(options, folder, "gathered", labels, Speeds(DEVICE_FLOPS, 1e6))
        slowest_s = max(s for n, s in known.busy.items() if n in {f"d{i:02}" for i in range(99)})
        server_s = known.busy["coordinator"]
        link_s = max(s for name, s in known.busy.items() if name.endswith((" up", " down")))
        for case in options.cases:
            load, link = CASES[case]
            speeds = Speeds(
                DEVICE_FLOPS * server_s / (load * slowest_s), 1e6 * link_s / (link * slowest_s)
            )
            shares = []
            for waves in ("gathered", "available"):
                found = run(options, folder, waves, labels, speeds)
                busiest, bound_s = max(found.busy.items(), key=lambda item: item[1])
                shares.append(bound_s / found.seconds)
                rows.append(
                    [
                        labels,
                        case,
                        waves,
                        f"{found.seconds:.2f}",
                        f"{busiest} {bound_s:.2f}",
                        f"{shares[-1]:.3f}",
                        f"{found.loss:.6f}",
                    ]
                )
                print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro", type=int, default=16, help="micro-batches of a step")
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--spread", type=float, default=0.3)
    parser.add_argument("--jitter", type=float, default=0.3)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--labels", nargs="+", default=["server", "device"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--smoke", action="store_true", help="four devices, a step, no page")
    options = parser.parse_args()
    if options.smoke:
        options.devices, options.rounds, options.steps, options.micro = 4, 1, 2, 2
    with tempfile.TemporaryDirectory(prefix="waves-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", 40 * options.devices)
        rows = measure(options, folder)
    heads = ["labels", "busiest by design", "waves", "seconds", "bound", "share", "train loss"]
    text = f"{header('Waves: how near the bound', options)}\n\n{table(heads, rows)}\n"
    if not options.smoke:
        print(save("waves", text))


if __name__ == "__main__":
    main()
