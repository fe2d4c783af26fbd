"""What a run survives, with the real commands: kills, cuts, swallowed bytes, silence, slow links.

    python benchmarks/soak.py --case kills [--coordinator 25 --device 25 --both 10]
    python benchmarks/soak.py --case links [--cuts 50]
    python benchmarks/soak.py --case slow [--patience 20]
    python benchmarks/soak.py --case silence [--patience 20]

Three devices of the base model cut at 1, 3 and 4 of 8 blocks; each case beside an undisturbed run
of the same seed. "Equal" means that every bit of the adapter is; otherwise the largest relative
difference of a weight's dW is given. Many devices that come and go: soak_churn.py.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from report import header, save, table
from soak_fleet import SoakFleet, difference

SPLITS = (1, 3, 4)
# Far above what any case takes beside its faults.
LONG_S = 600.0
IMPORTS = "import torch, transformers.models.llama.modeling_llama, peft, coordinator.rounds.launch"
Act = Callable[["Case"], None]


@dataclass
class Case:
    """One run that is disturbed, and what was measured in it."""

    fleet: SoakFleet
    draw: random.Random
    restarts_s: list[float] = field(default_factory=list)
    """From the start of a new coordinator to its first round."""
    returns_s: list[float] = field(default_factory=list)
    """From a coordinator that listens again to its last device that is ready."""
    faults: int = 0
    codes: list[int | None] = field(default_factory=list)
    """Exit codes of devices that were there to the end."""
    text: str = ""
    """Why it did not complete; empty if it did."""


class Soak:
    """Cases beside undisturbed runs of the same settings."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._cache = folder / "cache"
        self._references: dict[str, dict[str, Any]] = {}
        self.rows: list[tuple[object, ...]] = []

    def fleet(self, name: str, words: int = 12, **settings: Any) -> SoakFleet:
        """Return a fleet that is not started yet."""
        fleet = SoakFleet(self._folder / name, self._cache, SPLITS, **settings)
        for device in fleet.names:
            fleet.write_rows(device, words)
        return fleet

    def reference(self, words: int = 12, **settings: Any) -> dict[str, Any]:
        """Return the adapter of an undisturbed run with these settings."""
        key = repr((words, sorted(settings.items())))
        if key not in self._references:
            fleet = self.fleet(f"reference-{len(self._references)}", words, **settings)
            try:
                fleet.serve()
                fleet.start()
                fleet.wait_until(fleet.is_over, LONG_S)
                assert fleet.coordinator is not None
                assert fleet.coordinator.code == 0, fleet.coordinator.text
                self._references[key] = fleet.adapter()
            finally:
                fleet.end()
        return self._references[key]

    def run(
        self, name: str, act: Act, *, is_exact: bool = True, words: int = 12, **settings: Any
    ) -> Case:
        """Disturb one run, judge what came of it, and note a row.

        Args:
            name: Of the case.
            act: What is done to the run; it may return before the run's end.
            is_exact: Whether every device takes part in every round.
            words: Words of a text.
            settings: Of the run.
        """
        wanted = self.reference(words, **settings) if is_exact else None
        case = Case(self.fleet(name, words, **settings), random.Random(f"{self._seed} {name}"))
        fleet = case.fleet
        try:
            fleet.serve()
            fleet.start()
            act(case)
            fleet.wait_until(fleet.is_over, LONG_S)
            assert fleet.coordinator is not None
            if fleet.coordinator.code != 0:
                case.text = f"coordinator ended with {fleet.coordinator.code}"
            case.codes = [leave(p) for p in fleet.devices.values()]
        except TimeoutError:
            case.text = "it stood still"
        finally:
            fleet.end()
        self._note(name, case, wanted)
        return case

    def _note(self, name: str, case: Case, wanted: dict[str, Any] | None) -> None:
        samples = result = "-"
        if not case.text:
            run = case.fleet.run
            full = run["default"]["batch_size"] * len(SPLITS) * run["steps_per_round"]
            counts = case.fleet.samples()
            is_whole = len(counts) == run["rounds"] and set(counts) == {full}
            samples = "exact" if is_whole else f"{sum(counts)} of {full * len(counts)}"
            if wanted is not None:
                differs = difference(case.fleet.adapter(), wanted)
                result = f"dW {differs:.1e}" if differs else "equal"
        row = (
            name,
            case.faults,
            case.text or "completed",
            " ".join(str(code) for code in case.codes),
            samples,
            result,
            times(case.restarts_s),
            times(case.returns_s),
        )
        self.rows.append(row)
        print(*row, sep=" | ", file=sys.stderr, flush=True)


def times(seconds: Sequence[float]) -> str:
    """Return median and maximum."""
    return f"{median(seconds):.1f} / {max(seconds):.1f} s" if seconds else "-"


def leave(program: Any) -> int | None:
    """Return the exit code of a device after the run's end; None where it came back too late."""
    try:
        code: int = program.wait(20.0)
    except subprocess.TimeoutExpired:
        return None
    return code


# ---- kills ----


def kills(soak: Soak, options: argparse.Namespace) -> None:
    """Kill the coordinator, each device, and both, and start what was killed again at once."""
    for who, count in (
        ("coordinator", options.coordinator),
        *((f"d{index}", options.device) for index in range(len(SPLITS))),
        ("both", options.both),
    ):
        left, number = count, 0
        while left > 0:
            number += 1
            case = soak.run(f"kill {who} {number}", partial(kill_often, who, left), rounds=10)
            left -= case.faults
            if not case.faults:
                break


def kill_often(who: str, most: int, case: Case) -> None:
    """Kill *who* at random moments until the run is over or it was killed *most* times."""
    fleet = case.fleet
    fleet.wait_until(lambda: fleet.path.exists(), 60.0)
    while case.faults < most:
        end_s = time.monotonic() + case.draw.uniform(0.3, 9.0)
        while time.monotonic() < end_s and not fleet.is_over():
            time.sleep(0.02)
        if fleet.is_over():
            return
        victims = {"coordinator": [], "both": [case.draw.choice(fleet.names)]}.get(who, [who])
        case.faults += 1
        for name in victims:
            fleet.devices[name].kill()
        if victims:
            fleet.start(*victims)
        if who in ("coordinator", "both"):
            restart(case)


def restart(case: Case) -> None:
    """Kill the coordinator, start it again, and measure how soon it is where it was."""
    fleet = case.fleet
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    rounds, joined = len(fleet.events("round.started")), len(fleet.events("device.joined"))
    began = time.monotonic()
    coordinator = fleet.serve()
    if case.draw.random() < 0.3:
        return  # the next kill may come at any moment of its start
    fleet.wait_until(lambda: "listening at" in coordinator.text or fleet.is_over(), LONG_S)
    listening = time.monotonic()
    all_back = joined + len(fleet.names)
    fleet.wait_until(
        lambda: len(fleet.events("device.joined")) >= all_back or fleet.is_over(), LONG_S
    )
    if fleet.is_over():
        return
    case.returns_s.append(time.monotonic() - listening)
    fleet.wait_until(lambda: len(fleet.events("round.started")) > rounds or fleet.is_over(), LONG_S)
    if not fleet.is_over():
        case.restarts_s.append(time.monotonic() - began)


def imports_s() -> float:
    """Return the seconds that a program's imports take here and now, as a median of three."""
    found = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        found.append(time.monotonic() - began)
    return median(found)


# ---- links ----


def links(soak: Soak, options: argparse.Namespace) -> None:
    """Cut links at random, and swallow their bytes."""
    for labels in ("device", "server"):
        cuts = partial(cut, options.cuts)
        soak.run(f"{options.cuts} cuts, labels {labels}", cuts, rounds=12, labels=labels)
        soak.run(f"60 s swallowed, labels {labels}", swallow, rounds=6, labels=labels)
        soak.run(f"half-open connections, labels {labels}", half_open, rounds=6, labels=labels)


def slow_links(soak: Soak, options: argparse.Namespace) -> None:
    """Let large messages travel slowly, longer than a device may be silent."""
    for labels in ("device", "server"):
        # Texts of 500 tokens, 32 of them at once: 8 MB of hidden state in float32.
        soak.run(
            f"10 Mbit/s, 8 MB tensors, labels {labels}",
            slow,
            words=300,
            labels=labels,
            rounds=1,
            steps_per_round=1,
            patience_s=options.patience,
            max_length=500,
            default={"batch_size": 32, "codec": "float32"},
            evaluation={"on_devices": False},
        )


def ready(case: Case) -> None:
    """Wait for the first round."""
    case.fleet.wait_until(lambda: bool(case.fleet.events("round.started")))


def cut(count: int, case: Case) -> None:
    """Reset or hold up a random link, again and again."""
    ready(case)
    while case.faults < count and not case.fleet.is_over():
        relay = case.fleet.relays[case.draw.choice(case.fleet.names)]
        if case.draw.random() < 0.5:
            relay.reset()
        else:
            relay.pause()
            threading.Timer(case.draw.uniform(0.1, 3.0), relay.heal).start()
        case.faults += 1
        time.sleep(case.draw.uniform(0.1, 0.8))


def swallow(case: Case) -> None:
    """Swallow for 60 s what the connections of all devices carry."""
    ready(case)
    time.sleep(case.draw.uniform(0.5, 2.0))
    for relay in case.fleet.relays.values():
        relay.swallow(existing_only=False)
    time.sleep(60.0)
    for relay in case.fleet.relays.values():
        relay.heal()
    case.faults += 1


def half_open(case: Case) -> None:
    """Swallow for good what the connections of all devices carry; new connections work."""
    ready(case)
    time.sleep(case.draw.uniform(0.5, 2.0))
    for relay in case.fleet.relays.values():
        relay.swallow()
    case.faults += 1


def slow(case: Case) -> None:
    """Let every link carry 10 Mbit/s each way."""
    for relay in case.fleet.relays.values():
        relay.limit(1.25e6)
    case.fleet.wait_until(case.fleet.is_over, LONG_S)
    lost = case.fleet.events("device.left")
    dialled = [relay.num_accepted for relay in case.fleet.relays.values()]
    case.faults = len(lost) + sum(dialled) - 2 * len(dialled)  # two lines a device, dialled once


# ---- silence ----


def silence(soak: Soak, options: argparse.Namespace) -> None:
    """Freeze a device for a share of the coordinator's patience, then let it go on."""
    patience_s = options.patience
    for share in (0.5, 1.5, 5.0):
        for needed in (3, 2):
            soak.run(
                f"silent for {share:g} x patience, {needed} of 3 needed",
                partial(freeze, share * patience_s),
                is_exact=needed == 3,
                rounds=8,
                min_devices=needed,
                patience_s=patience_s,
            )


def freeze(seconds: float, case: Case) -> None:
    """Freeze the second device in the middle of a round; it must be ready again afterwards."""
    ready(case)
    fleet, frozen = case.fleet, case.fleet.devices["d1"]
    time.sleep(case.draw.uniform(0.5, 2.0))
    frozen.signal(signal.SIGSTOP)
    case.faults += 1
    time.sleep(seconds)
    was_lost, joined = any(is_of(fleet, "device.left")), sum(is_of(fleet, "device.joined"))
    frozen.signal(signal.SIGCONT)
    thawed = time.monotonic()
    if was_lost:
        fleet.wait_until(
            lambda: fleet.is_over() or sum(is_of(fleet, "device.joined")) > joined, LONG_S
        )
        if not fleet.is_over():
            case.returns_s.append(time.monotonic() - thawed)


def is_of(fleet: SoakFleet, kind: str) -> list[bool]:
    """Return, for each event of a kind, whether it is the frozen device's."""
    return [row["device"] == "d1" for row in fleet.events(kind)]


CASES = {"kills": kills, "links": links, "slow": slow_links, "silence": silence}
HEADS = (
    "case",
    "faults",
    "outcome",
    "devices' exit codes",
    "samples",
    "adapter",
    "restart to first round, median / max",
    "devices back, median / max",
)


def main() -> None:
    """Run one kind of case and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--coordinator", type=int, default=25, help="kills of the coordinator")
    parser.add_argument("--device", type=int, default=25, help="kills of each device")
    parser.add_argument("--both", type=int, default=10, help="kills of both at once")
    parser.add_argument("--cuts", type=int, default=50, help="cuts of links in one run")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds (patience_s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for all files, kept afterwards")
    options = parser.parse_args()
    before_s = imports_s()
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(options.keep or Path(scratch), options.seed)
        CASES[options.case](soak, options)
    text = (
        f"Imports of a program alone: {before_s:.1f} s before and {imports_s():.1f} s after "
        "the cases, median of three each; a restart includes them."
    )
    title = f"Soak: {options.case}"
    save(
        f"soak-{options.case}", "\n\n".join([header(title, options), text, table(HEADS, soak.rows)])
    )


if __name__ == "__main__":
    main()
