"""How a re-cut of dW shares the norms between B and A, for `svd`; see docs/method.md, Aggregation.

    python benchmarks/recut.py [--rounds 8] [--rates 3e-3 1e-2] [--seeds 0 1 2]

Five simulated devices of ranks 1, 2, 4, 8 and 16 that hold the whole model (k = L), E2E sorted by
its meaning so that their shards differ, stories260K, AdamW, 10 steps of 5 x 4 a round. `svd` gives
A's rows the norm of freshly drawn ones and B the rest; `svd-balanced` gives both the same. Beside
them `exact`, `stack` and `zeropad`. Dev NLL per token on 200 references.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path

from report import header, save, table

from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.run import simulate
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.training import TrainingConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
MODEL = SHARED / "stories260K" / "hf"
RULES = ("exact", "stack", "svd", "svd-balanced", "zeropad")
RANKS = (1, 2, 4, 8, 16)


def write_rows(source: str, target: Path, count: int) -> None:
    """Evenly spaced rows of an E2E file, sorted by meaning."""
    with (SHARED / "e2e" / source).open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["mr"])
    with target.open("w", encoding="utf-8") as file:
        for row in rows[:: max(1, len(rows) // count)][:count]:
            file.write(json.dumps({"prompt": row["mr"], "completion": row["ref"]}) + "\n")


def final_loss(folder: Path, rule: str, rate: float, seed: int, rounds: int) -> float:
    """Dev NLL after the last round."""
    names = [f"device-{i}" for i in range(len(RANKS))]
    data = {"append_eos": False, "too_long": "cut"}
    config = SimulationConfig(
        model=str(MODEL),
        runs=folder / "runs",
        labels="device",
        rounds=rounds,
        steps_per_round=10,
        max_length=256,
        aggregation=rule,  # type: ignore[arg-type]
        default=DeviceSettings(split="all", batch_size=4, codec="float32"),
        devices={n: DeviceSettings(r=rank) for n, rank in zip(names, RANKS, strict=True)},
        lora=LoraConfig(r=16, lora_alpha=16.0),
        training=TrainingConfig(learning_rate=rate, lr_scheduler_type="constant", seed=seed),
        evaluation=EvaluationConfig(
            data=DataConfig(path=str(folder / "dev.jsonl"), **data),
            every_rounds=rounds,
            on_devices=False,
        ),
        device="cpu",
        simulation=FleetConfig(
            devices=dict.fromkeys(names, SimulatedDeviceConfig()),
            data=DataConfig(path=str(folder / "train.jsonl"), **data),
            shards="contiguous",
        ),
    )
    loss = simulate(config, Watchers()).rounds[-1].loss
    assert loss is not None
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_rows("trainset.csv", Path(folder) / "train.jsonl", 2000)
        write_rows("devset.csv", Path(folder) / "dev.jsonl", 200)
        for rule in RULES:
            found = {
                rate: [
                    final_loss(Path(folder), rule, rate, seed, options.rounds)
                    for seed in options.seeds
                ]
                for rate in options.rates
            }
            cells = [
                f"{statistics.mean(v):.3f} ({min(v):.3f} - {max(v):.3f})" for v in found.values()
            ]
            rows.append([rule, *cells])
            print(rows[-1], flush=True)
    titles = ["rule", *(f"lr {rate:g}" for rate in options.rates)]
    text = [
        header("How a re-cut shares the norms", options),
        f"Dev NLL per token after {options.rounds} rounds of 10 steps, mean (range) of "
        f"{len(options.seeds)} seeds; {__doc__.split(chr(10) * 2)[2]}",
        table(titles, rows),
    ]
    save("recut", "\n\n".join(text))


if __name__ == "__main__":
    main()
