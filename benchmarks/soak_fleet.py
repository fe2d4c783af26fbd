"""A coordinator and its devices as the real commands, for benchmarks that disturb them.

Everything lies in one folder: keys, configurations, data, logs, the run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from coordinator.gateway.keys.allow_list import AllowList
from coordinator.results.run_folder import RunFolder
from edge_sdk.transport.keys import create_key_pair
from tests.e2e.relay import Relay

MODEL = Path(__file__).parents[1] / "examples" / "base"
WORDS = ("red", "green", "small", "old", "boat", "house", "river", "bird", "sees", "likes", "near")
BATCH = 4
LOOK_S = 0.02


class Program:
    """One of our console scripts; what it says goes to a file."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log = log
        self._begins = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name(command[0])), *command[1:]],
                cwd=log.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.pid = self._process.pid

    @property
    def text(self) -> str:
        """What it has said since it was started."""
        return self.log.read_bytes()[self._begins :].decode(errors="replace")

    @property
    def code(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.code is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; return the exit code."""
        return self._process.wait(timeout_s)


class SoakFleet:
    """One run: its coordinator, its devices, and what has come of it."""

    def __init__(
        self,
        folder: Path,
        cache: Path,
        splits: tuple[int, ...],
        *,
        has_relays: bool = True,
        **settings: Any,
    ) -> None:
        """Write keys, configurations and data.

        Args:
            folder: A new folder for all files.
            cache: Downloaded parts of the model; may be shared by several fleets.
            splits: Blocks of each device.
            has_relays: Whether each device dials through a relay, else straight.
            settings: Keys of the run's configuration that differ from the usual ones.
        """
        folder.mkdir(parents=True)
        self.folder, self.cache = folder, cache
        self.names = [f"d{index}" for index in range(len(splits))]
        self.port = free_port()
        self.devices: dict[str, Program] = {}
        self.coordinator: Program | None = None
        address = f"tcp://127.0.0.1:{self.port}"
        self.relays = {name: Relay(address) for name in self.names if has_relays}
        public = create_key_pair(folder / "coordinator.key").public
        for name in self.names:
            pair = create_key_pair(folder / f"{name}.key")
            AllowList(folder / "devices.yaml").register(name, pair.public)
        self.run: dict[str, Any] = {
            "model": str(MODEL),
            "listen": address,
            "secret_key": "coordinator.key",
            "allow_list": "devices.yaml",
            "runs": "runs",
            "name": "run",
            "labels": "device",
            "rounds": 4,
            "steps_per_round": 6,
            "min_devices": len(splits),
            "default": {"batch_size": BATCH, "codec": "float32"},
            "devices": {n: {"split": k} for n, k in zip(self.names, splits, strict=True)},
            "lora": {"r": 4, "lora_alpha": 8},
            "training": {"learning_rate": 2e-3},
            "device": "cpu",
            "waves": "gathered",
            **settings,
        }
        write(folder / "run.yaml", self.run)
        for name in self.names:
            device = {
                "coordinator": self.relays[name].address if has_relays else address,
                "server_key": public,
                "secret_key": f"{name}.key",
                "data": {"path": f"{name}.jsonl", "validation_fraction": 0.25},
                "state": f"state-{name}",
                "cache": str(cache),
                "device": "cpu",
                "threads": 1,
            }
            write(folder / f"{name}.yaml", device)
            self.write_rows(name, words=12)

    def write_rows(self, name: str, words: int, count: int = 48) -> None:
        """Write the private texts of a device, each of about so many words."""
        draw = np.random.default_rng(self.names.index(name))
        texts = [" ".join(draw.choice(WORDS, words)) for _ in range(count)]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (self.folder / f"{name}.jsonl").write_text("".join(lines))

    # ---- programs ----

    def serve(self) -> Program:
        """Start the coordinator; where the run's folder exists, it goes on."""
        command = (
            ["resume", "runs/run"] if self.path.exists() else ["serve", "--config", "run.yaml"]
        )
        self.coordinator = Program(self.folder / "coordinator.log", "coordinator", *command)
        return self.coordinator

    def start(self, *names: str) -> None:
        """Start devices, by default all."""
        for name in names or self.names:
            log = self.folder / f"{name}.log"
            self.devices[name] = Program(log, "edge-sdk", "run", "--config", f"{name}.yaml")

    def end(self) -> None:
        """End what is left."""
        programs = [*self.devices.values(), *([self.coordinator] if self.coordinator else [])]
        for program in programs:
            program.signal(signal.SIGCONT)
            program.kill()
        for relay in self.relays.values():
            relay.close()

    # ---- what happens ----

    @property
    def path(self) -> Path:
        """The run's own folder."""
        return self.folder / "runs" / "run"

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far."""
        if not self.path.exists():
            return []
        return [row for row in RunFolder(self.path).rows("events.jsonl") if row["event"] == kind]

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 120.0) -> float:
        """Wait for something; return the seconds that it took.

        Raises:
            TimeoutError: it did not come.
        """
        began = time.monotonic()
        while not is_so():
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{self.folder}: nothing for {timeout_s:.0f} s")
            time.sleep(LOOK_S)
        return time.monotonic() - began

    def is_over(self) -> bool:
        """Whether the coordinator has ended."""
        return self.coordinator is None or self.coordinator.code is not None

    # ---- what has come of it ----

    def samples(self) -> list[int]:
        """Samples of each round, as counted by the coordinator; a round is there once."""
        rows = RunFolder(self.path).rows("metrics.jsonl")
        assert [row["round"] for row in rows] == list(range(len(rows))), rows
        return [row["samples"] for row in rows[1:]]

    def adapter(self) -> dict[str, np.ndarray]:
        """The tensors of the exported adapter."""
        found: dict[str, np.ndarray] = load_file(
            self.path / "adapter" / "adapter_model.safetensors"
        )
        return found


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference of a weight's dW = B A; 0.0 if all bits are equal."""
    if ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours):
        return 0.0
    return max(
        float(np.linalg.norm(product(ours, n) - product(theirs, n)))
        / float(np.linalg.norm(product(theirs, n)))
        for n in theirs
        if "lora_A" in n
    )


def product(adapter: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return B A of the weight whose A is called *name*, in float64."""
    b_OR = adapter[name.replace("lora_A", "lora_B")].astype(np.float64)
    found: np.ndarray = b_OR @ adapter[name].astype(np.float64)
    return found


def write(path: Path, settings: dict[str, Any]) -> None:
    """Write a configuration; JSON is YAML."""
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
