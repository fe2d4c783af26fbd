"""Whatever a registered device sends, and whenever: the coordinator goes on with the others.

A whole coordinator with a tiny model, without sockets: a gateway that is a list. What the real one
refuses before anybody sees it is refused here by the same functions.
"""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import DeviceStats, Event, Joined, Left, Received, Rejected
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from coordinator.rounds.loop import Coordinator
from coordinator.rounds.state import Phase
from edge_sdk.errors import MAX_TEXT, LocalProtocolError, PeerGone, RemoteProtocolError
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.protocol import headers
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage, TensorOut
from edge_sdk.protocol.messages import (
    FROM_DEVICE,
    PROTOCOL_VERSION,
    Activation,
    AdapterUpload,
    EvalReport,
    Failure,
    Hello,
    PartRequest,
    PlanAssigned,
    Probe,
    Profiled,
    Ready,
    Refused,
    RoundStart,
    Stamp,
    StepReport,
    TopGradient,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.protocol.tensors import check_tensors
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.transport.link import NO_TENSORS
from profiler.profile import DeviceProfile
from tests.e2e.cluster import save_model
from tests.tiny import VOCAB

HIDDEN, ROWS, LENGTH = 32, 2, 6
STATES = ("unknown", "assigned", "ready", "member", "member", "member", "forward", "gone")
# Messages whose numbers reach the model.
TRAINED = (Activation, TopGradient, StepReport, AdapterUpload, EvalReport)
INTEGERS = [-(2**63), -1, 0, 1, 2, 5, 2**31, 2**62, 2**63 - 1]
FLOATS = [-1.7e308, -1e300, -1.0, 0.0, 1e-300, 0.5, 1e12, 3.3e38, 1.7e308]
TEXTS = ["", "a", "../../x", "\x1b[2Jred", "e\u0301" * 400, "\0" * 9000, "float32", "OutOfMemory"]
NUMBERS = [0.0, 1e-38, 0.5, 1.0, 30.0, 1e4, 1e12, 1e19, 3.3e38, -3.3e38, float("nan"), float("inf")]


class Now(Executor):
    """Computes at once, where it is called."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return what *fn* has made."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - handed on
            future.set_exception(error)
        return future


class Listed:
    """A gateway whose devices do what a script says."""

    address = "nowhere"

    def __init__(self) -> None:
        self.script: Iterator[list[Event]] = iter(())
        self.sent: list[tuple[str, Any]] = []
        self.present: set[str] = set()
        self._left: list[Event] = []

    def devices(self) -> list[str]:
        """Return who is here."""
        return sorted(self.present)

    def stats(self, device: str) -> DeviceStats:
        """Return nothing much."""
        self._find(device)
        return DeviceStats(
            session="0" * 32,
            bytes_up=0,
            bytes_down=0,
            reconnects=0,
            rtt_s=None,
            heard_s=0.0,
            telemetry={},
            num_moved=0,
        )

    def events(self, timeout_s: float) -> list[Event]:
        """Return what the script has next."""
        left, self._left = self._left, []
        return left or next(self.script)

    def send(
        self, device: str, message: Any, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Write the message as for the wire, and note it."""
        self._find(device)
        outgoing = OutgoingMessage(message, tensors)
        for number in range(outgoing.num_packets):
            size = outgoing.packet_bytes(number) - (0 if number else len(outgoing.head))
            outgoing.write_chunk(number, np.empty(size, np.uint8))
        self.sent.append((device, message))

    def last(self, device: str, kind: type) -> Any:
        """Return the last message of *kind* to a device, None without one."""
        found = [m for d, m in self.sent if d == device and isinstance(m, kind)]
        return found[-1] if found else None

    def set_limits(self, device: str, max_message_bytes: int) -> None:
        """Take note of nothing."""
        self._find(device)

    def drop(self, device: str, reason: str) -> None:
        """End a session."""
        self._find(device)
        self.present.discard(device)
        self._left.append(Left(device, reason))

    forget = drop

    def wake(self) -> None:
        """Do nothing: nobody sleeps."""

    def close(self) -> None:
        """Do nothing."""

    def _find(self, device: str) -> None:
        if device not in self.present:
            raise PeerGone(f"device {device!r} has no session")


def arriving(
    device: str, message: Any, tensors: Mapping[str, np.ndarray] | None = None
) -> list[Event]:
    """What the gateway makes of a message: itself, or what was wrong with it."""
    tensors = dict(tensors or {})
    try:
        specs = tuple(
            headers.TensorSpec(name, CODECS[str(array.dtype)], array.shape)
            for name, array in tensors.items()
        )
        read, _ = headers.decode_header(headers.encode_header(message, specs))
        check_tensors(read, tensors)
    except (LocalProtocolError, RemoteProtocolError) as error:
        return [Rejected(device, str(error))]
    return [Received(device, Envelope(read, tensors))]


CODECS = {"float32": "float32", "int32": "int32", "uint8": "uint8"}


def coming(device: str) -> list[Event]:
    """A session begins and the device says Hello."""
    hello = Hello(
        stamp=Stamp(), protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32", "float16")
    )
    return [Joined(device, "1" * 32), *arriving(device, hello)]


def extreme(draw: random.Random, hint: Any) -> Any:
    """Return a value of a field that nobody expects."""
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        kind: Any = hint
        return kind(**{name: extreme(draw, one) for name, one in hints.items()})
    if typing.get_origin(hint) is tuple:
        return tuple(extreme(draw, args[0]) for _ in range(draw.randrange(4)))
    if typing.get_origin(hint) is dict:
        names = draw.sample(TEXTS, draw.randrange(3))
        return {name: extreme(draw, args[1]) for name in names}
    if type(None) in args:
        return None if draw.random() < 0.5 else extreme(draw, args[0])
    return draw.choice({int: INTEGERS, float: FLOATS, str: TEXTS, bool: [False, True]}[hint])


class Case(NamedTuple):
    """What a device sends, and when."""

    state: str
    kind: type
    fields: dict[str, Any]
    stamp: Stamp | None
    """None: the right one."""
    number: float
    """All numbers of its tensors."""


def drawn_case(draw: random.Random) -> Case:
    """Return a message that is mostly honest, or hardly."""
    kind = draw.choice([*FROM_DEVICE, *TRAINED, *TRAINED])
    hints = typing.get_type_hints(kind)
    del hints["stamp"]
    changed = set(draw.sample(sorted(hints), min(len(hints), draw.choice([0, 0, 1, 2]))))
    fields = {
        name: HONEST[name] if name in HONEST and name not in changed else extreme(draw, hint)
        for name, hint in hints.items()
    }
    stamp = None if draw.random() < 0.75 else extreme(draw, Stamp)
    return Case(draw.choice(STATES), kind, fields, stamp, draw.choice(NUMBERS))


NO_PROFILE = DeviceProfile()
PROFILE = DeviceProfile(
    memory_bytes=2.0**25,
    overhead_bytes=0.0,
    flops_per_s=1e9,
    up_bytes_per_s=1e6,
    down_bytes_per_s=4e6,
    round_trip_s=0.01,
)
HONEST: dict[str, Any] = {
    "micro": 0,
    "num_micro": 1,
    "num_targets": ROWS * (LENGTH - 1),
    "num_samples": 9,
    "vocab_size": VOCAB,
    "held_steps": (),
    "protocol": PROTOCOL_VERSION,
    "codecs": ("float32",),
    "backend": "torch",
    "loss": 1.0,
    "loss_sum": 9.0,
    "compute_s": 0.1,
    "wait_s": 0.1,
    "peak_bytes": 9,
    "importance": {},
    "num_sequences": ROWS,
    "num_tokens": 8,
    "num_correct": 3,
    "is_eval": False,
    "model_hash": "",
    "reason": "enough",
}


def tensors_of(kind: type, plan: Plan | None, number: float, labels: str) -> dict[str, np.ndarray]:
    """What travels with a message, all of one *number*."""
    rows = ROWS if plan is None else plan.micro_batch
    hidden = np.full((rows, LENGTH, HIDDEN), number, np.float32)
    if kind is Activation:
        own = {"hidden": hidden, "lengths": np.full(rows, LENGTH, np.int32)}
        return own | (
            {"labels": np.full((rows, LENGTH), 5, np.int32)} if labels == "server" else {}
        )
    if kind is TopGradient:
        return {"grad": hidden}
    if kind is Probe:
        return {"data": np.zeros(9, np.uint8)}
    if kind is not AdapterUpload or plan is None:
        return {}
    return {
        f"{name}.{factor}": np.full(shape, number, np.float32)
        for name, rank in plan.ranks.items()
        for factor, shape in (("A", (rank, 4 * HIDDEN)), ("B", (HIDDEN, rank)))
    }


class Play:
    """One run in which devices do what they like."""

    def __init__(self, coordinator: Coordinator, gateway: Listed, labels: str) -> None:
        self._coordinator, self._gateway, self._labels = coordinator, gateway, labels

    def _check(self) -> None:
        """Whoever is ready has a plan, and every block of a member's plan is somewhere."""
        coordinator = self._coordinator
        state, plans = coordinator.run.state, coordinator.admission.plans
        assert state.ready.keys() <= plans.keys()
        for name in state.members:
            assert plans[name].split >= coordinator.learned.engine.first
        planned = coordinator.planner.plans
        if planned is not None and state.phase is Phase.GATHERING:
            assert state.ready.keys() <= planned.plans.keys()

    def come(self, device: str) -> Iterator[list[Event]]:
        """Greet, and tell what is asked for."""
        self._gateway.present.add(device)
        yield coming(device)
        welcome = self._gateway.last(device, Welcome)
        if welcome.wants_profile:
            yield arriving(device, Profiled(stamp=welcome.stamp, profile=PROFILE))

    def ready(self, device: str) -> list[Event]:
        """Be ready for a round."""
        stamp = self._gateway.last(device, Welcome).stamp
        ready = Ready(stamp=stamp, vocab_size=VOCAB, num_samples=9, held_steps=())
        return arriving(device, ready)

    def _enter(self, device: str, state: str) -> Iterator[list[Event]]:
        """Bring a device into *state*; a device that holds the round makes that others wait."""
        if state == "unknown":
            self._gateway.present.add(device)
            yield [Joined(device, "1" * 32)]
            return
        if state == "ready":
            holder = f"{device}-holder"
            yield from self.come(holder)
            yield self.ready(holder)
        yield from self.come(device)
        if state in ("ready", "member", "forward"):
            yield self.ready(device)
        if state == "forward":
            start = self._gateway.last(device, RoundStart)
            sent = tensors_of(Activation, None, 0.5, self._labels)
            yield arriving(device, Activation(stamp=start.stamp, **honest(Activation)), sent)
        if state == "gone":
            self._gateway.present.discard(device)
            yield [Left(device, "gone")]

    def _end_round(self, device: str, kind: type) -> Iterator[list[Event]]:
        """After an upload, bring the round to where it is needed."""
        for _ in range(8 if kind is AdapterUpload else 0):
            state, start = self._coordinator.run.state, self._gateway.last(device, RoundStart)
            if device not in state.members or state.step >= state.end_step or start is None:
                return
            stamp = dataclasses.replace(start.stamp, step=state.step)
            if state.is_forward_done or state.here.away.waves:
                sent = tensors_of(TopGradient, None, 0.5, self._labels)
                yield arriving(device, TopGradient(stamp=stamp, micro=0), sent)
            else:
                sent = tensors_of(Activation, None, 0.5, self._labels)
                yield arriving(device, Activation(stamp=stamp, **honest(Activation)), sent)

    def script(self, drawn: list[Case]) -> Iterator[list[Event]]:
        """One device after the other, then an honest one that is welcome."""
        for number, (state, kind, fields, stamp, value) in enumerate(drawn):
            device = f"d{number}"
            for events in self._enter(device, state):
                yield events
                self._check()
            last = next(
                (m for d, m in reversed(self._gateway.sent) if d == device and hasattr(m, "stamp")),
                None,
            )
            right = last.stamp if last is not None else Stamp()
            assigned = self._gateway.last(device, PlanAssigned)
            plan = assigned.plan if assigned is not None else None
            if plan is not None and fields.get("num_micro") == HONEST["num_micro"]:
                fields = {**fields, "num_micro": plan.batch_size // plan.micro_batch}
            message = kind(stamp=right if stamp is None else stamp, **fields)
            for _ in range(1 if fields.get("is_eval") else 2):  # no batch is evaluated twice
                if device in self._gateway.present:
                    yield arriving(device, message, tensors_of(kind, plan, value, self._labels))
                    yield from self._end_round(device, kind)
                    self._check()
                    yield []  # what comes of it
            for name in (device, f"{device}-holder"):
                if name in self._gateway.present:
                    self._gateway.present.discard(name)
                    yield [Left(name, "the test goes on")]
                    self._check()
        yield from self.come("honest")
        yield self.ready("honest")
        assert self._gateway.last("honest", RoundStart) is not None
        self._coordinator.stop()
        while True:
            self._gateway.present.clear()
            yield [Left("honest", "the test is over")]


PLANNING = PlanningConfig(
    split="memory",
    ranks="uniform",
    rank_set=(2,),
    server_memory_bytes=2.0**29,
    server_flops_per_s=4e9,
)


@pytest.fixture(scope="module", params=["server", "device", "planned", "available", "away"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ServeConfig, ServerModel]:
    """A tiny GPT-2, whose LayerNorm makes NaN of what overflows; labels, plans and waves differ."""
    folder = tmp_path_factory.mktemp("model")
    config = ServeConfig(
        model=str(save_model("gpt2", folder)),
        secret_key=folder / "none.key",
        allow_list=folder / "none.yaml",
        rounds=1000,
        steps_per_round=2,
        min_devices=1,
        labels="device" if request.param in ("device", "away") else "server",
        waves="available" if request.param in ("available", "away") else "gathered",
        default=DeviceSettings(
            split=None if request.param == "planned" else 2, batch_size=ROWS, codec="float32"
        ),
        planning=PLANNING if request.param == "planned" else PlanningConfig(),
        lora=LoraConfig(r=2, lora_alpha=2, target_modules=("mlp.c_proj",)),
        training=TrainingConfig(learning_rate=1e-3),
        device="cpu",
    )
    return config, ServerModel(config, PartCache(folder / "parts"))


@pytest.mark.parametrize("seed", range(3))
def test_the_coordinator_goes_on(
    model: tuple[ServeConfig, ServerModel], tmp_path: Path, seed: int
) -> None:
    """Any message with any fields in any state: others are served, and all files can be read."""
    config, served = model
    draw, number = random.Random(seed), 20 if config.planning.split == "fixed" else 8
    folder, gateway = RunFolder.create(tmp_path, "run"), Listed()
    coordinator = Coordinator(config, served, folder, gateway, Watchers(), "run-1", pool=Now())
    play = Play(coordinator, gateway, config.labels)
    gateway.script = play.script([drawn_case(draw) for _ in range(number)])

    assert coordinator.serve() == "paused"

    assert_readable(folder)


def told(gateway: Listed, kind: type) -> list[str]:
    """What devices were told with messages of *kind*, in order."""
    found = [m for _, m in gateway.sent if isinstance(m, kind)]
    return [m.reason if isinstance(m, Refused) else f"{m.error}: {m.text}" for m in found]


def honest(kind: type, **changes: Any) -> dict[str, Any]:
    """Fields of an honest message, but for *changes*."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in HONEST.items() if name in names} | changes


# state, message, its fields, the number in all its tensors, which labels, and what it is told
ONCE_FATAL: dict[str, tuple[str, type, dict[str, Any], float, str, str]] = {
    "a long backend": (
        "unknown",
        Hello,
        honest(Hello, backend="\0" * 9000, sdk_version="0"),
        0.0,
        "both",
        "backend '",
    ),
    "long codecs": (
        "unknown",
        Hello,
        honest(Hello, codecs=("\x1b" * 9000,), sdk_version="0"),
        0.0,
        "both",
        "no common codec: the device speaks ",
    ),
    "a profile": ("assigned", Profiled, {"profile": NO_PROFILE}, 0.0, "both", "nobody asked for"),
    "an unknown part": (
        "assigned",
        PartRequest,
        {"sha256": "0" * 64, "offset": 0},
        0.0,
        "both",
        "no part of this model",
    ),
    "an evaluation that overflows": (
        "member",
        Activation,
        honest(Activation, is_eval=True),
        3.3e38,
        "server",
        "the evaluation of what it sent is not finite",
    ),
    "an activation that overflows": (
        "member",
        Activation,
        honest(Activation),
        3.3e38,
        "both",
        "NumericError",
    ),
    **{
        f"an upload of {number:g}": (
            "member",
            AdapterUpload,
            honest(AdapterUpload),
            number,
            "both",
            "beyond all measure",
        )
        for number in (10.0, 1e3, 1e12, 1e19, 3.3e38, -3.3e38)
    },
    "a loss without end": (
        "member",
        StepReport,
        honest(StepReport, loss=1.7e308, num_targets=2**62),
        0.0,
        "both",
        "step report",
    ),
    "a loss below all": (
        "member",
        EvalReport,
        honest(EvalReport, loss_sum=-1e300, num_targets=5),
        0.0,
        "both",
        "evaluation: loss -1e+300",
    ),
    "targets that are not there": (
        "member",
        Activation,
        honest(Activation, num_targets=1),
        0.5,
        "server",
        "num_targets: 1 after 1, and 10 in the labels",
    ),
}


@pytest.mark.parametrize("case", ONCE_FATAL)
def test_what_once_ended_a_run_ends_the_part_of_its_sender(
    model: tuple[ServeConfig, ServerModel], tmp_path: Path, case: str
) -> None:
    """The sender is told what was wrong, in one line of bounded length, and others are served."""
    config, served = model
    state, kind, fields, number, labels, words = ONCE_FATAL[case]
    is_planned = config.planning.split != "fixed"
    if labels not in ("both", config.labels) or is_planned:
        return  # a matter of the other place of labels; and the fields are those of fixed plans
    folder, gateway = RunFolder.create(tmp_path, "run"), Listed()
    coordinator = Coordinator(config, served, folder, gateway, Watchers(), "run-1", pool=Now())
    play = Play(coordinator, gateway, config.labels)
    gateway.script = play.script([Case(state, kind, fields, None, number)])

    assert coordinator.serve() == "paused"

    texts = told(gateway, Refused) + told(gateway, Failure)
    assert len(texts) == 1
    assert words in texts[0]
    assert texts[0].isprintable()
    assert_readable(folder)


def test_whoever_a_new_plan_leaves_out_is_told_before_blocks_move(
    model: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """When the engine is built anew, every device that is ready has a plan with blocks in it."""
    config, served = model
    if config.planning.split == "fixed":
        return  # there nobody is left out
    folder, gateway = RunFolder.create(tmp_path, "run"), Listed()
    config = dataclasses.replace(config, min_devices=2)
    coordinator = Coordinator(config, served, folder, gateway, Watchers(), "run-1", pool=Now())
    play, planner = Play(coordinator, gateway, config.labels), coordinator.planner
    ready: list[set[str]] = []
    renew = coordinator.learned.renew

    def watched() -> None:
        ready.append(set(coordinator.run.state.ready))
        renew()

    coordinator.learned.renew = watched  # type: ignore[method-assign]

    def script() -> Iterator[list[Event]]:
        yield from play.come("small")
        yield from play.come("large")
        yield play.ready("small")
        assert planner.plans is not None
        plans = {"large": dataclasses.replace(planner.plans.plans["large"], split=5)}
        planner.plans = dataclasses.replace(planner.plans, plans=plans, refused={"small": "why"})
        yield []
        assert told(gateway, Refused) == ["why"]
        assert not coordinator.run.state.ready
        coordinator.stop()
        while True:
            yield []

    gateway.script = script()
    assert coordinator.serve() == "paused"
    assert not any("small" in names for names in ready)
    assert coordinator.learned.engine.first == 5


def assert_readable(folder: RunFolder) -> None:
    """Each line of the run's files is one object that every parser reads, of no great length."""
    for path in Path(folder.path).glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert len(line) < 20_000
            json.loads(line, parse_constant=_refuse)
    for row in folder.rows("events.jsonl"):
        texts = (row.get("reason", ""), row.get("error", ""))
        assert all(text.isprintable() and len(text) <= MAX_TEXT + 40 for text in texts)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
