"""Rounds without a barrier against rounds with one: modelled time to a loss, with one slow device.

    python benchmarks/buffered.py [--rounds 12] [--steps 10] [--slower 10] [--seeds 0 1 2]

Five simulated devices, equal but for one that is --slower times as slow, on our base model cut at
different blocks, `exact`. Both runs train on equally many samples under one schedule; the buffered
one merges as many updates at once as there are devices. `iid` deals the texts at random;
`contiguous` gives each device texts of its own meaning, those of the slow one nobody else has.
Loss is that of a dev file after the last round or merge; the target is that of the run with
barriers, and 1 % more. Times are modelled, so that a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from report import header, save, table

from coordinator.config.buffered import BufferedConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.result import SimulatedRound
from coordinator.lab.simulation.run import simulate
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.training import TrainingConfig

ROOT = Path(__file__).parents[1]
SPLITS = {"a": 2, "b": 3, "c": 2, "d": 4, "slow": 2}
FAST_FLOPS_PER_S = 2e10
WITHIN = 1.01


class Run(NamedTuple):
    """What a run came to."""

    rounds: list[SimulatedRound]

    @property
    def loss(self) -> float:
        """Loss at the end."""
        loss = self.rounds[-1].loss
        assert loss is not None
        return loss

    def seconds_to(self, loss: float) -> float | None:
        """Modelled seconds until the loss was first so low; None if it never was."""
        reached = [r.seconds for r in self.rounds if r.loss is not None and r.loss <= loss]
        return reached[0] if reached else None


def train(folder: Path, mode: str, shards: Any, seed: int, options: argparse.Namespace) -> Run:
    """Simulate one run."""
    how: dict[str, Any] = {"append_eos": False, "too_long": "cut"}
    speeds = {n: FAST_FLOPS_PER_S / (options.slower if n == "slow" else 1.0) for n in SPLITS}
    config = SimulationConfig(
        model=str(ROOT / "examples" / "base"),
        runs=folder / "runs",
        labels="server",
        rounds=options.rounds,
        steps_per_round=options.steps,
        max_length=128,
        round_mode=mode,  # type: ignore[arg-type]
        aggregation="exact",
        buffered=BufferedConfig(size=options.buffer, staleness_power=options.power),
        default=DeviceSettings(batch_size=8, micro_batch=4, codec="float32"),
        devices={name: DeviceSettings(split=split) for name, split in SPLITS.items()},
        lora=LoraConfig(r=8, lora_alpha=16.0),
        training=TrainingConfig(learning_rate=options.rate, seed=seed),
        evaluation=EvaluationConfig(
            data=DataConfig(path=str(folder / "dev.jsonl"), limit=options.dev, **how),
            on_devices=False,
        ),
        device="cpu",
        simulation=FleetConfig(
            devices={
                name: SimulatedDeviceConfig(link="lan-1g", flops_per_s=speed)
                for name, speed in speeds.items()
            },
            data=DataConfig(path=str(folder / "shard-0.jsonl"), **how),
            shards=shards,
            cache=folder / "parts",
        ),
    )
    return Run(simulate(config, Watchers()).rounds)


def compared(folder: Path, shards: str, options: argparse.Namespace) -> list[object]:
    """One row: both forms of rounds over all seeds."""
    waited, buffered, faster, to_target = [], [], [], []
    for seed in options.seeds:
        whole = train(folder, "synchronous", shards, seed, options)
        own = train(folder, "buffered", shards, seed, options)
        waited.append(whole.loss)
        buffered.append(own.loss)
        faster.append(whole.rounds[-1].seconds / own.rounds[-1].seconds)
        limit = WITHIN * whole.loss
        first, later = own.seconds_to(limit), whole.seconds_to(limit)
        to_target.append(later / first if first and later else float("nan"))
        print(shards, seed, whole.loss, own.loss, faster[-1], to_target[-1], flush=True)
    excess = [100 * (b / w - 1) for b, w in zip(buffered, waited, strict=True)]
    return [
        shards,
        spread(waited, "{:.3f}"),
        spread(buffered, "{:.3f}"),
        spread(excess, "{:+.2f} %"),
        spread(faster, "{:.1f} x"),
        spread(to_target, "{:.1f} x"),
    ]


def spread(values: list[float], form: str) -> str:
    """Mean and range."""
    mean, least, most = statistics.mean(values), min(values), max(values)
    return f"{form.format(mean)} ({form.format(least)} - {form.format(most)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--slower", type=float, default=10.0, help="times, of one in five")
    parser.add_argument("--buffer", type=int, default=None, help="updates of a merge")
    parser.add_argument("--power", type=float, default=0.5, help="of the staleness weight")
    parser.add_argument("--dev", type=int, default=200, help="texts of the dev file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shards", nargs="+", default=["iid", "contiguous"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        script = ROOT / "examples" / "data" / "make_sample.py"
        words = ["--out", name, "--shards", "1", "--pairs", "4000"]
        subprocess.run([sys.executable, str(script), *words], check=True, stdout=subprocess.DEVNULL)
        rows = [compared(Path(name), shards, options) for shards in options.shards]
    titles = [
        "texts",
        "loss with barriers",
        "without",
        "more",
        "faster at equally many samples",
        "faster to within 1 %",
    ]
    about = __doc__.split("\n\n")[2]
    text = [header("Rounds without a barrier", options), about, table(titles, rows)]
    save("buffered", "\n\n".join(text))


if __name__ == "__main__":
    main()
