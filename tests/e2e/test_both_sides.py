"""Whatever happens between coordinator and devices: the run ends, and every sample counts once.

Both sides are real. Nothing here waits: time and network are those of `scheduled.py`. For a long
search, set EDGESPLIT_EXAMPLES to the number of runs and pass `--hypothesis-profile=default`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Event
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import Telemetry
from coordinator.results.events.run import RunFinished
from coordinator.results.run_folder import RunFolder
from coordinator.rounds.loop import GOODBYE_S, Coordinator
from coordinator.rounds.plans.changes import Moved, PlanChanges
from edge_sdk.client.backends import BACKENDS
from edge_sdk.client.config import ClientConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import held_out, save_model, sentences
from tests.e2e.light import LIGHT, LightEngine
from tests.e2e.scheduled import (
    Clock,
    Crashed,
    HeldCompute,
    Network,
    ScheduledDevice,
    ScheduledGateway,
)

EXAMPLES = int(os.environ.get("EDGESPLIT_EXAMPLES", "30"))
PATIENCE_S = 16.0
# The coordinator looks at its clock that often: what comes later is no fault of a device.
TICK_S = 2.0
ROUNDS, STEPS, BATCH = 2, 2, 4
# Things that may still have to happen once all is well again, and seconds that may pass in which
# nothing can: so long the last words may take where a device comes back while they are said.
MOST_MOVES = 3000
MOST_IDLE_S = GOODBYE_S + 5.0


class Kind(NamedTuple):
    """A kind of run."""

    labels: Literal["server", "device"]
    in_flight: int
    fleet: str
    min_devices: int
    least_devices: int | None = None
    """Devices that are enough once a step is done."""
    is_light: bool = True
    """Whether the model is one that costs nothing, so that more can be tried."""
    deadline_s: float | None = None
    """Seconds after which a round goes on without those who are late."""
    saves: bool = False
    """Whether rounds are saved after every step."""

    @property
    def needs_all(self) -> bool:
        """Whether no round goes on without a device."""
        return self.least_devices is None and self.min_devices == len(FLEETS[self.fleet])


FLEETS: dict[str, dict[str, DeviceSettings]] = {
    "pair": {"a": DeviceSettings(split=1, r=2), "b": DeviceSettings(split=2, micro_batch=4)},
    "three": {name: DeviceSettings(split=n) for name, n in zip("abc", (1, 1, 2), strict=True)},
    "whole": {"a": DeviceSettings(split=1), "b": DeviceSettings(split="all", r=3)},
}


class Step(NamedTuple):
    """Something that happens to a run."""

    kind: str
    device: int = 0
    amount: int = 1
    is_followed: bool = False
    """Whether the coordinator hears of it together with what comes next."""


@dataclass
class Result:
    """How a run has gone."""

    rows: list[dict[str, Any]]
    ledger: dict[str, Any]
    members: dict[int, dict[str, int]] = field(default_factory=dict)
    """Steps that each member of a round has trained in it, by round."""
    has_rounded: bool = False
    """Whether a device got factors and residual of later steps instead of its own state."""
    idle_s: float = 0.0
    """Seconds in which nothing could happen, after all was well again."""


class World:
    """A coordinator, its devices, and a script of what happens to them."""

    def __init__(self, folder: Path, kind: Kind, script: list[Step], seed: int, model: str) -> None:
        self.folder, self.kind, self.script = folder, kind, list(script)
        self.clock = Clock()
        self.config = make_config(kind, model)
        names = sorted(self.config.devices)
        self.devices = {name: self._device(name, Path(model)) for name in names}
        self.network = Network(self.clock, self.devices, seed)
        self.coordinator: Coordinator
        self.members: dict[int, dict[str, int]] = {}
        self.to_move: set[str] = set()
        self.is_healed = self.is_over = False
        self.num_moves, self.idle_s, self.num_short = 0, 0.0, 0
        self.has_rounded = False

    def _device(self, name: str, model: Path) -> ScheduledDevice:
        config = ClientConfig(
            coordinator="tcp://nobody:0",
            server_key="",
            data=held_out(),
            device="cpu",
            backend="light" if self.kind.is_light else "torch",
            cache=model.parent / "parts",
            state=self.folder / name,
        )
        return ScheduledDevice(name, config, sentences(ord(name), 12))

    def run(self) -> Result:
        """Run to the end."""
        # No power is cut here, and memory is not short: neither is worth its time.
        no_sync = patch("os.fsync", lambda _file: None)
        no_return = patch("edge_sdk.client.setup.return_freed", lambda: None)
        no_time = patch("time.monotonic", self.clock)
        with no_sync, no_return, no_time, moving(self.to_move):
            for device in self.devices.values():
                device.start()
            while self._serve() != "completed":
                pass
            self.network.end()
        folder = RunFolder(self.folder / "run")
        ledger = self.coordinator.learned.ledger.state()
        rows = folder.rows("metrics.jsonl")
        return Result(rows, ledger, self.members, self.has_rounded, self.idle_s)

    def _serve(self) -> str:
        """Run one coordinator process; return how it ended."""
        gateway, compute = ScheduledGateway(self.clock, PATIENCE_S), HeldCompute()
        path = self.folder / "run"
        is_new = not path.exists()
        folder = RunFolder.create(self.folder, "run") if is_new else RunFolder(path)
        self.network.gateway, self.network.compute = gateway, compute
        self.coordinator = Coordinator(
            self.config,
            model_of(self.config, is_light=self.kind.is_light),
            folder,
            gateway,
            self,
            "run-1",
            pool=compute,
            least_devices=self.kind.least_devices if is_new else None,
            clock=self.clock,
        )
        self.coordinator._desk._pool = compute  # planning, too, takes as long as it takes
        if not is_new:
            self.coordinator.resume(folder.load_checkpoint())
        gateway.next = self._next
        try:
            return self.coordinator.serve()
        except Crashed:
            return "completed" if self.is_over else "crashed"
        finally:
            self.has_rounded |= gateway.has_rounded
            gateway.close()

    def see(self, event: RunEvent) -> None:
        """Note who took part in a round, and how many steps each has trained."""
        if isinstance(event, Telemetry):
            state = self.coordinator.run.state
            self.members[event.round + 1] = {n: state.num_steps(n) for n in state.members}
        self.network.gateway.come_nearer()
        self.is_over |= isinstance(event, RunFinished) and event.outcome == "completed"

    # ---- what happens next ----

    def _next(self) -> list[Event]:
        self._check()
        while self.script:
            step = self.script.pop(0)
            getattr(self, f"_{step.kind}")(self._pick(step), step.amount)
            if not step.is_followed:
                return []
        if not self.is_healed:
            self._heal()
        self.num_moves += 1
        assert self.num_moves < MOST_MOVES, f"no end: {self._where()}"
        if not self.network.flow():
            self.network.pass_time(0.5)
            self.idle_s += 0.5
            assert self.idle_s < MOST_IDLE_S, f"nothing happens any more: {self._where()}"
        return []

    def _where(self) -> str:
        coordinator = self.coordinator
        sessions = {n: (s.up, s.down) for n, s in self.network.gateway.sessions.items()}
        return f"{coordinator.run.state}; sessions {sessions}"

    def _check(self) -> None:
        """Look whether all that is known fits together between two turns of the loop."""
        for device in self.devices.values():
            assert device.error is None, f"{device.name}: {device.error!r}"
        if self.is_over:
            return
        state, admission = self.coordinator.run.state, self.coordinator.admission
        assert state.members.keys() - state.kept <= state.ready.keys() <= admission.plans.keys()
        assert admission.plans.keys() <= self.network.gateway.sessions.keys()

    def _heal(self) -> None:
        """Let everybody be here, and well."""
        self.is_healed = True
        self.network.gateway.crash_in = 0
        for device in self.devices.values():
            device.is_cut, device.hung_until_s, device.link.dies_in = False, 0.0, 0
            if device.is_leaving:
                device.kill()  # it would have left by now
            if not (device.is_alive or device.words):
                device.start()

    def _pick(self, step: Step) -> ScheduledDevice:
        names = sorted(self.devices)
        return self.devices[names[step.device % len(names)]]

    def _flow(self, _device: ScheduledDevice, amount: int) -> None:
        """Let many things happen, one after the other, each heard of by itself."""
        if amount > 1:
            self.script.insert(0, Step("flow", 0, amount - 1))
        self.network.flow()

    def _up(self, device: ScheduledDevice, _amount: int) -> None:
        self.network.up(device)

    def _down(self, device: ScheduledDevice, _amount: int) -> None:
        self.network.down(device)

    def _kill(self, device: ScheduledDevice, _amount: int) -> None:
        device.kill()

    def _leave(self, device: ScheduledDevice, _amount: int) -> None:
        """Let a process end in order: it asks first, where it is in a round."""
        if device.hung_until_s <= self.clock.now_s:
            device.leave()

    def _doom(self, device: ScheduledDevice, amount: int) -> None:
        """Let a process end at a message of its own."""
        device.link.dies_in = amount

    def _restart(self, device: ScheduledDevice, _amount: int) -> None:
        device.kill()
        device.start()

    def _wipe(self, device: ScheduledDevice, _amount: int) -> None:
        device.kill()
        device.wipe()

    def _forget(self, device: ScheduledDevice, _amount: int) -> None:
        if device.name in self.network.gateway.sessions:
            self.network.gateway.over(device.name, "forgotten")

    def _silence(self, device: ScheduledDevice, amount: int) -> None:
        device.is_cut = True
        self._time(device, amount)

    def _hang(self, device: ScheduledDevice, amount: int) -> None:
        device.hung_until_s = self.clock.now_s + amount * TICK_S

    def _mend(self, device: ScheduledDevice, _amount: int) -> None:
        device.is_cut, device.hung_until_s = False, 0.0

    def _time(self, _device: ScheduledDevice, amount: int) -> None:
        """Let seconds pass, in as many turns of the coordinator."""
        if amount > 1:
            self.script.insert(0, Step("time", 0, amount - 1))
        self.network.pass_time(TICK_S)

    def _oom(self, device: ScheduledDevice, _amount: int) -> None:
        is_hung = device.hung_until_s > self.clock.now_s
        if device.is_alive and not is_hung and self.num_short < 2:
            self.num_short += 1
            device.run_out_of_memory()

    def _move(self, device: ScheduledDevice, _amount: int) -> None:
        self.to_move.add(device.name)

    def _stop(self, _device: ScheduledDevice, _amount: int) -> None:
        self.coordinator.stop()

    def _crash(self, _device: ScheduledDevice, amount: int) -> None:
        if amount == 1:
            raise Crashed
        self.network.gateway.crash_in = amount - 1


@contextmanager
def moving(names: set[str]) -> Iterator[None]:
    """Let devices be told their plans anew at the end of the next round, as after a re-plan."""
    plan_again: Callable[..., None] = PlanChanges.plan_again

    def plan_some_again(
        self: PlanChanges, reports: Any, before: Any, then: Callable[[Moved], None]
    ) -> None:
        def told(moved: Moved) -> None:
            state = self._run.state
            more = set() if state.round == state.total_rounds else names & state.ready.keys()
            names.difference_update(more)
            both = dict.fromkeys(more) | moved
            then({name: both[name] for name in sorted(both)})

        plan_again(self, reports, before, told)

    with patch.object(PlanChanges, "plan_again", plan_some_again):
        yield


@cache
def make_config(kind: Kind, model: str) -> ServeConfig:
    """Return the run of a kind."""
    return ServeConfig(
        model=model,
        rounds=ROUNDS,
        steps_per_round=STEPS,
        min_devices=kind.min_devices,
        labels=kind.labels,
        waves="gathered",
        default=DeviceSettings(
            split=2, batch_size=BATCH, micro_batch=2, in_flight=kind.in_flight, codec="float32"
        ),
        devices=FLEETS[kind.fleet],
        lora=LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")),
        training=TrainingConfig(learning_rate=1e-2),
        patience_s=PATIENCE_S,
        round_deadline_s=kind.deadline_s,
        save_every_s=0.0 if kind.saves else None,
        device="cpu",
    )


MODELS: dict[int, ServerModel] = {}


def model_of(config: ServeConfig, *, is_light: bool) -> ServerModel:
    """Return the model of a run, read once."""
    if id(config) not in MODELS:
        parts = PartCache(Path(config.model).parent / "parts")
        make = LightEngine if is_light else None
        MODELS[id(config)] = ServerModel(config, parts, make)
    return MODELS[id(config)]


def go(
    kind: Kind, script: list[Step], seed: int, model: Path, make_world: type[World] = World
) -> Result:
    """Let a script happen to a run; look at what has been counted."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(BACKENDS, light=LIGHT):
        world = make_world(Path(folder), kind, script, seed, str(model))
        result = world.run()
    assert [row["round"] for row in result.rows] == list(range(ROUNDS + 1))
    for row in result.rows[1:]:
        members = result.members[row["round"]]
        assert row["samples"] == BATCH * sum(members.values())
        assert row["train_loss_by_device"].keys() >= members.keys()
        for name, num_steps in members.items():
            first, last = (row["round"] - 1) * STEPS, row["round"] * STEPS
            own = {(row["round"] - 1, step) for step in range(last - num_steps, last)}
            assert first <= last - num_steps < last
            assert own <= world.devices[name].trained
    return result


REFERENCES: dict[Kind, Result] = {}


def undisturbed(kind: Kind, model: Path) -> Result:
    """Return the run to which nothing happens."""
    if kind not in REFERENCES:
        REFERENCES[kind] = go(kind, [], 0, model)
    return REFERENCES[kind]


TRAVEL = ["up", "down"]
PROCESSES = ["kill", "leave", "doom", "restart", "wipe", "hang", "oom"]
SESSIONS = ["forget", "silence", "mend", "move"]
FLOWS = st.builds(Step, st.just("flow"), amount=st.integers(1, 60))
OTHERS = st.builds(
    Step,
    st.sampled_from([*TRAVEL, *PROCESSES, *SESSIONS, "time", "stop", "crash"]),
    st.integers(0, 2),
    st.integers(1, 30),
    st.booleans(),
)
KINDS = st.builds(
    Kind,
    labels=st.sampled_from(["server", "device"]),
    in_flight=st.integers(1, 2),
    fleet=st.sampled_from(sorted(FLEETS)),
    min_devices=st.sampled_from([3, 2, 1]),
    least_devices=st.sampled_from([None, None, 1]),
    deadline_s=st.sampled_from([None, None, 3.0]),
    saves=st.booleans(),
).map(lambda kind: kind._replace(min_devices=min(kind.min_devices, len(FLEETS[kind.fleet]))))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of three blocks, all of which are in the cache beside it."""
    model = save_model("llama", tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=3)
    undisturbed(Kind("server", 1, "whole", 2), model)
    return model


SCRIPTS = st.lists(FLOWS | OTHERS, max_size=20)
SEEDS = st.integers(0, 2**16)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@example(Kind("server", 2, "pair", 2), [Step("oom")], 0)  # while it waits for a welcome
@given(KINDS, SCRIPTS, SEEDS)
def test_the_run_goes_on_to_its_end(tiny: Path, kind: Kind, script: list[Step], seed: int) -> None:
    """Once all are here again nothing stands still, and every sample is counted once."""
    result = go(kind, script, seed, tiny)
    kinds = {step.kind for step in script}
    if kind.needs_all and "oom" not in kinds:
        plain = kind._replace(deadline_s=None, saves=False)
        compare(result, undisturbed(plain, tiny), has_lost="wipe" in kinds)


@settings(max_examples=max(1, EXAMPLES // 15), suppress_health_check=[HealthCheck.too_slow])
@given(KINDS, SCRIPTS, SEEDS)
def test_so_does_one_that_trains_a_real_model(
    tiny: Path, kind: Kind, script: list[Step], seed: int
) -> None:
    """The same holds with blocks that are computed as in a deployment."""
    go(kind._replace(is_light=False), script, seed, tiny)


def compare(result: Result, whole: Result, *, has_lost: bool) -> None:
    """Look whether a run has found what the undisturbed one has, to the bit where promised."""
    if not result.has_rounded:
        for row, other in zip(result.rows, whole.rows, strict=True):
            # Who leaves after the last round is not waited for.
            assert row.pop("eval_by_device", {}).items() <= other["eval_by_device"].items()
            assert row == {name: value for name, value in other.items() if name != "eval_by_device"}
        assert result.ledger.keys() == whole.ledger.keys()
        assert all((result.ledger[n] == value).all() for n, value in whole.ledger.items())
    elif not has_lost:
        for row, other in zip(result.rows[1:], whole.rows[1:], strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
