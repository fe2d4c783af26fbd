"""A run's folder as a coordinator leaves it, written by its own watchers from made-up events."""

from __future__ import annotations

import math
import random
from pathlib import Path

from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.plan_set import (
    DeviceExplanation,
    Explanation,
    PlanSet,
    ServerExplanation,
)
from coordinator.results.events.devices import DeviceJoined, DeviceLeft, DeviceStatus
from coordinator.results.events.plans import ImportanceMeasured, PlanMade
from coordinator.results.events.rounds import RoundDone, RoundStarted, StepDone, Telemetry, Waiting
from coordinator.results.events.run import FolderKnown, RunFinished, RunStarted
from coordinator.results.lifecycle import COMPLETED, new_folder
from coordinator.results.run_folder import RunFolder
from coordinator.results.standing.live_file import LiveFile
from coordinator.results.standing.observed import Computed, DeviceOffer, ModelKnown
from coordinator.results.watchers import RunFiles, Watchers
from edge_sdk.protocol.messages import Stamp, StepReport
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile

KINDS = ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
BOARDS = ("Jetson Orin Nano 8GB", "Jetson Orin NX 16GB", "Raspberry Pi 5", "Jetson AGX Orin 64GB")
BLOCKS, STEPS = 16, 10
GB = 10.0**9


class Clock:
    """Seconds as the events say."""

    now_s = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


class Recording:
    """A run of some devices; the same numbers each time."""

    def __init__(
        self, runs: Path, names: list[str], rounds: int, name: str = "run", board: str = ""
    ) -> None:
        self.names, self.rounds, self._board_name = names, rounds, board
        self.config = ServeConfig(
            model="models/Qwen3-0.6B",
            runs=runs,
            name=name,
            rounds=rounds,
            steps_per_round=STEPS,
            default=DeviceSettings(split=2, batch_size=4, codec="int8"),
        )
        with new_folder(self.config) as folder:
            self.folder: RunFolder = folder
        self._clock, self._draw = Clock(), random.Random(7)
        self.watcher = Watchers([RunFiles(self.folder), LiveFile(self._clock)])
        self._bytes = dict.fromkeys(names, (0, 0))

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def play(self, *, ends: bool = True) -> Recording:
        """Let the whole run happen; one that does not end stops in its last round."""
        see, draw = self.watcher.see, self._draw
        see(FolderKnown(self.path))
        see(ModelKnown(BLOCKS))
        see(RunStarted(self.config.name or "", 0))
        for number, name in enumerate(self.names):
            profile = DeviceProfile(
                board=self._board_name or BOARDS[number % len(BOARDS)],
                memory_bytes=4 * GB,
                flops_per_s=2e11,
                up_bytes_per_s=2e6 * (1 + number % 5),
                down_bytes_per_s=5e6 * (1 + number % 5),
            )
            see(DeviceOffer(name, "has told what it offers", profile))
        see(PlanMade(0, self._plans(0), ["first plans"], {}))
        for name in self.names:
            see(DeviceJoined(name, self._split(name), 240, 3, 1))
        see(RoundDone({"round": 0, "step": 0, "eval": self._score(0)}, {}))
        for round_ in range(self.rounds):
            self._round(round_)
            if round_ == 0 and len(self.names) > 1:
                see(Waiting("step 12", [self.names[1]], 15.0, 0.8))
                see(DeviceStatus(self.names[1], "silent for 15 s; it may come back", is_delay=True))
            if round_ == 1:
                see(DeviceLeft(self.names[-1], "the link is gone"))
                see(DeviceJoined(self.names[-1], self._split(self.names[-1]), 240))
                see(PlanMade(2, self._plans(2), ["bandwidth of a link has changed"], {}))
            see(ImportanceMeasured(round_ + 1, self._importance(round_)))
            samples = len(self.names) * STEPS * 4
            row = {"round": round_ + 1, "step": (round_ + 1) * STEPS, "samples": samples}
            row |= {"train_loss": self._loss(round_), "eval": self._score(round_ + 1)}
            row["train_loss_by_device"] = {
                name: self._loss(round_) + draw.uniform(-0.2, 0.2) for name in self.names
            }
            see(RoundDone(row, {}))
        if ends:
            see(RunFinished(COMPLETED))
        return self

    def _round(self, round_: int) -> None:
        see = self.watcher.see
        see(RoundStarted(round_, 1, self.names, {}))
        costs = {}
        for step in range(round_ * STEPS, (round_ + 1) * STEPS):
            for number, name in enumerate(self.names):
                self._clock.now_s += 0.9 / len(self.names)
                see(Computed("forward", [name], 0.2 / len(self.names)))
                self._clock.now_s += 0.6 / len(self.names)
                see(Computed("backward", [name], 0.4 / len(self.names)))
                see(self._step(name, number, round_, step))
            see(Computed("adapters", (), 0.05))
        for number, name in enumerate(self.names):
            up, down = self._bytes[name]
            costs[name] = {"tokens": 4800, "compute_s": 9.0, "wait_s": 4.0, "peak_bytes": 10**9}
            costs[name] |= {"bytes_up": up, "bytes_down": down, "board": self._board(number)}
        self._clock.now_s += 0.8
        see(Computed("aggregation", (), 0.7))
        see(Telemetry(round_, 14.0 + round_, costs))

    def _step(self, name: str, number: int, round_: int, step: int) -> StepDone:
        up, down = self._bytes[name]
        self._bytes[name] = up + 180_000 * (1 + number % 3), down + 200_000
        waits = self._draw.uniform(0.1, 0.7)
        report = StepReport(
            stamp=Stamp(run="r", device=name, round=round_, step=step),
            loss=self._loss(round_) + self._draw.uniform(-0.3, 0.3),
            num_targets=470,
            num_sequences=4,
            num_tokens=480,
            compute_s=1.4 - waits,
            wait_s=waits,
            peak_bytes=900_000_000 + 4_000_000 * (number % 50),
        )
        return StepDone(name, report, (round_ + 1) * STEPS, self._bytes[name], self._board(number))

    def _board(self, number: int) -> dict[str, float]:
        return {
            "memory_total": 8 * GB,
            "memory_available": GB * (0.4 + (number * 37 % 60) / 10),
            "temperature": 48.0 + number * 13 % 41,
            "power": 6.5 + number % 9,
            "energy": 900.0 + 40 * number,
            "throttled": float(number % 17 == 5),
        }

    def _split(self, name: str) -> int:
        return 2 + self.names.index(name) * 5 % 7

    def _loss(self, round_: int) -> float:
        return 1.9 + 1.8 * math.exp(-round_ / 3)

    def _score(self, round_: int) -> dict[str, float]:
        loss = 2.0 + 1.9 * math.exp(-round_ / 3)
        return {"loss": loss, "targets": 900, "accuracy": 0.6 - loss / 9, "perplexity": 2.7**loss}

    def _importance(self, round_: int) -> dict[str, float]:
        return {
            f"model.layers.{block}.{kind}": 2.0 / (1 + block) + abs(math.sin(n + round_ / 4))
            for block in range(BLOCKS)
            for n, kind in enumerate(KINDS)
        }

    def _plans(self, round_: int) -> PlanSet:
        plans, stories = {}, {}
        for number, name in enumerate(self.names):
            split = self._split(name)
            ranks = {
                f"model.layers.{block}.{kind}": (4, 8, 16, 2, 0)[(block + n + number + round_) % 5]
                for block in range(split)
                for n, kind in enumerate(KINDS)
            }
            alphas = dict.fromkeys(ranks, 16.0)
            plans[name] = Plan(split=split, ranks=ranks, alphas=alphas, batch_size=4, micro_batch=4)
            stories[name] = DeviceExplanation(
                budget_bytes=4 * GB,
                options=(),
                binding=("memory", "time", "all blocks")[number % 3],
                planned_bytes=3.1 * GB + number * 1e7,
                adapter_bytes=1e7,
                adapter_budget_bytes=1e8,
                device_s=0.4 + number % 7 / 10,
                server_s=0.1,
            )
        server = ServerExplanation(
            first=2,
            budget_bytes=8 * GB,
            planned_bytes=GB,
            adapter_bytes=0.0,
            adapter_budget_bytes=0.0,
            server_s=0.3,
        )
        return PlanSet(
            plans=plans,
            server_ranks={},
            refused={},
            wave_s=1.1,
            utility=3.0,
            explanation=Explanation(devices=stories, server=server),
        )
