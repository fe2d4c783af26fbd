"""A run under siege: two honest devices train while others send whatever a message can hold.

A whole coordinator with a model that costs next to nothing, without sockets and without a second
thread. What the gateway refuses before anybody sees it is refused here by the same functions. The
hostile devices have nothing to teach: their blocks are frozen, and the coordinator's only adapters
lie below their split. So the honest ones must learn the very same with and without them.

New messages, fields and tensors are found by looking at the dataclasses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import typing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from coordinator.config.buffered import BufferedConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.engine.interface import Answer, EngineSpec, Job
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import DeviceStats, Event, Joined, Left, Received, Rejected
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from coordinator.rounds.loop import Coordinator
from coordinator.rounds.state import Phase
from edge_sdk.errors import LocalProtocolError, PeerGone, RemoteProtocolError
from edge_sdk.lora.factors import Array
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
    EvalResult,
    Gradient,
    Hello,
    PartData,
    PartRequest,
    Pause,
    Paused,
    PlanAssigned,
    Ready,
    RoundStart,
    Stamp,
    StepReport,
    TopGradient,
    TopHidden,
)
from edge_sdk.protocol.plan import Place
from edge_sdk.protocol.tensors import TENSORS, Tensor, check_tensors
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.transport.link import NO_TENSORS
from tests.coordinator.rounds import test_any_message
from tests.coordinator.rounds.test_any_message import Now
from tests.e2e.cluster import save_model
from tests.e2e.light import LightEngine
from tests.tiny import VOCAB

HIDDEN, ROWS, LENGTH, BLOCKS, INNER = 32, 2, 6, 5, 128
SPLIT, HOSTILE_SPLIT = 2, 3
HONEST = ("a", "b")
ROUNDS, STEPS = 5, 2
# A hostile device sends so many messages in a row before it does again what is due.
BURST = 6
NUM_HOSTILE = 12
# It does up to so much of what is due before it begins: a round is about half of that.
MOST_HONEST = 14
# Turns of the loop that honest devices take for an answer, so that there is time for others.
PACE = 4
FORMS = {
    f"{labels}-{waves}": {"labels": labels, "waves": waves}
    for labels in ("server", "device")
    for waves in ("gathered", "available")
} | {
    f"{labels}-buffered": {
        "labels": labels,
        "round_mode": "buffered",
        "aggregation": "exact",
        "buffered": BufferedConfig(size=2),
    }
    for labels in ("server", "device")
}

INTEGERS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 2**31, 2**53, 2**62, 2**63 - 1]
FLOATS = [-1.7e308, -1e300, -1.0, -0.0, 0.0, 1e-300, 0.5, 1e9, 1e12, 3.3e38, 1.7e308]
TEXTS = [
    "",
    "a",
    "../../x",
    "\x1b[2J\x1b]0;owned\x07red",
    "e\u0301" * 400,
    "\u202egnp.exe\u202c\u200b\u2066",
    "\ud7ff\U000e0001\ufeff\x85\u2028line",
    "\0" * 9000,
    "{0.device} {reason!r} %s [bold]x[/]",
    "x" * 5_000,
    "float32",
    "NumericError",
    "0" * 64,
    "honest\n2026-01-01 device.joined device=a",
]
NUMBERS = [
    *(0.0, 1e-38, 0.5, 1.0, 30.0, 1e4, 1e12, 1e19, 3.3e38, -3.3e38),
    *(float("nan"), float("inf"), float("-inf")),
]


# ---- a model that keeps devices apart ------------------------------------------------------------


class ApartEngine(LightEngine):
    """A micro-batch passes the adapters of the blocks after its split, and no others, alone."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._block = {
            name: next(int(part) for part in name.split(".") if part.isdigit())
            for name, rank in self.ranks.items()
            if rank
        }

    def _passes(self, job: Job) -> list[str]:
        return [name for name, block in self._block.items() if block >= job.split]

    def _factor_of(self, job: Job) -> np.float32:
        total = np.float32(1.0)
        for name in self._passes(job):
            held = self.adapters.factors(name)
            total += np.float32(0.1) * np.float32(held["B"][0] @ held["A"][:, 0])
            total += np.float32(0.1) * np.float32(held["U"][0] @ held["V"][:, 0])
        return total

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Go forward; see `Engine`."""
        here = sorted(jobs, key=lambda job: job.place)
        self.open.extend(here if keeps else ())
        return {job.place: job.hidden_BTD * self._factor_of(job) for job in here}

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go backward; see `Engine`."""
        jobs = [job for job in self.open if job.place in grads]
        rest = [job for job in self.open if job.place not in grads]
        self.open.clear()
        self.open.extend(rest)
        for job in jobs:
            if self._passes(job) and job.samples != 0.0:
                self.learn(float(np.vdot(grads[job.place], job.hidden_BTD)))
        return [
            Answer(job.device, grads[job.place] * self._factor_of(job), None, job.micro)
            for job in jobs
        ]

    def evaluate(self, job: Job) -> Any:
        """Return loss or final hidden state; see `Engine`."""
        (final_BTD,) = self.forward([job], 0, 0, keeps=False).values()
        if job.labels is None:
            return final_BTD
        return self._evaluated(final_BTD, job)

    @staticmethod
    def _evaluated(final_BTD: Array, job: Job) -> Any:
        from tests.e2e.light import TailSums

        count = int((job.labels[:, 1:] != -100).sum()) if job.labels is not None else 0
        return TailSums(0.5 * float(np.vdot(final_BTD, final_BTD)), count, 0)


def besieged(form: str, folder: Path) -> tuple[ServeConfig, ServerModel]:
    """Return the config and the model of a run of *form*."""
    path = folder / "model"
    if not path.exists():
        save_model("gpt2", path)
    frozen = "|".join(map(str, range(HOSTILE_SPLIT, BLOCKS)))
    honest = DeviceSettings(split=SPLIT, r=2, batch_size=2 * ROWS, micro_batch=ROWS)
    config = ServeConfig(
        model=str(path),
        secret_key=folder / "none.key",
        allow_list=folder / "none.yaml",
        rounds=ROUNDS,
        steps_per_round=STEPS,
        min_devices=len(HONEST),
        devices=dict.fromkeys(HONEST, honest),
        default=DeviceSettings(
            split=HOSTILE_SPLIT, r=0, batch_size=ROWS, micro_batch=ROWS, codec="float32"
        ),
        lora=LoraConfig(
            r=2,
            lora_alpha=2,
            target_modules=("mlp.c_proj",),
            rank_pattern={rf"h\.({frozen})\.mlp\.c_proj": 0},
        ),
        training=TrainingConfig(learning_rate=1e-3),
        device="cpu",
        **typing.cast(Any, FORMS[form]),
    )
    return config, ServerModel(config, PartCache(folder / "parts"), ApartEngine)


# ---- who takes part ------------------------------------------------------------------------------

Sent = tuple[Any, Mapping[str, np.ndarray]]


@dataclass
class Puppet:
    """A device that answers as an honest one does; its numbers follow from what it is sent."""

    name: str
    stamp: Stamp = field(default_factory=Stamp)
    """Of what it was told last."""
    assigned: PlanAssigned | None = None
    start: RoundStart | None = None
    due: deque[Sent] = field(default_factory=deque)
    """What it has yet to send."""
    seen: Any = field(default_factory=hashlib.sha256)
    """A hash of all numbers that it was ever sent."""
    has_greeted: bool = False
    asked: bool = False
    """Whether it has asked for a part."""
    _own: dict[str, np.ndarray] = field(default_factory=dict)
    _step: int = 0
    _micro: int = 0

    def take(self, message: Any, tensors: Mapping[str, np.ndarray]) -> None:
        """Hear a message, and queue what answers it."""
        self.stamp = message.stamp
        if isinstance(message, (RoundStart, Gradient, TopHidden, EvalResult)):
            for name, tensor in sorted(tensors.items()):
                self.seen.update(name.encode() + tensor.tobytes())
            self.seen.update(repr(getattr(message, "loss_sum", 0.0)).encode())
        answers: dict[type, Any] = {
            PlanAssigned: self._on_plan_assigned,
            PartData: self._on_part_data,
            RoundStart: self._on_round_start,
            EvalResult: self._on_eval_result,
            TopHidden: self._on_top_hidden,
            Gradient: self._on_gradient,
            Pause: self._on_pause,
        }
        is_late = self.start is None and type(message) in (EvalResult, TopHidden, Gradient)
        if type(message) in answers and not is_late:
            answers[type(message)](message, tensors)

    def _on_plan_assigned(self, message: PlanAssigned, _: Any) -> None:
        self.assigned, self.start = message, None
        if self.asked:
            self._say_ready()
        else:
            self.asked = True
            first = message.parts[0].sha256
            self._say(PartRequest(stamp=message.stamp, sha256=first, offset=0))

    def _on_part_data(self, _message: PartData, _: Any) -> None:
        self._say_ready()

    def _say_ready(self) -> None:
        self._say(Ready(stamp=self.stamp, vocab_size=VOCAB, num_samples=9, held_steps=()))

    def _on_round_start(self, message: RoundStart, tensors: Mapping[str, np.ndarray]) -> None:
        self.start, self._step, self._micro = message, message.stamp.step, 0
        own = {n: t for n, t in tensors.items() if n.endswith((".A", ".B"))}
        self._own = {**self._own, **own}
        if message.evaluate:
            self._say(self._activation(is_eval=True), self._numbers())
        else:
            self._next()

    def _on_eval_result(self, message: EvalResult, _: Any) -> None:
        report = EvalReport(stamp=message.stamp, loss_sum=9.0, num_targets=9, num_correct=3)
        self._say(report)
        self._next()

    def _on_top_hidden(self, message: TopHidden, tensors: Mapping[str, np.ndarray]) -> None:
        if message.is_eval:
            self._on_eval_result(typing.cast(Any, message), None)
            return
        grad = tensors["hidden"] * np.float32(0.25)
        self._say(TopGradient(stamp=self._now(), micro=message.micro), {"grad": grad})

    def _on_gradient(self, _message: Gradient, tensors: Mapping[str, np.ndarray]) -> None:
        slope = np.float32(1e-4) * np.sign(tensors["grad"].sum()) if tensors else np.float32(0.0)
        self._own = {name: value + slope for name, value in self._own.items()}
        self._micro += 1
        if self._micro == self._num_micro:
            self._micro = 0
            self._say(self._report())
            self._step += 1
        self._next()

    def _on_pause(self, message: Pause, _: Any) -> None:
        self._say(Paused(stamp=message.stamp))

    def _next(self) -> None:
        assert self.start is not None
        if self.start.end_step == self.start.stamp.step:
            return
        if self._step < self.start.end_step:
            self._say(self._activation(), self._numbers())
        else:
            self._say(AdapterUpload(stamp=self._now(), importance={}), self._own)

    @property
    def _num_micro(self) -> int:
        assert self.assigned is not None
        return self.assigned.plan.batch_size // self.assigned.plan.micro_batch

    def _now(self) -> Stamp:
        assert self.start is not None
        return replace(self.start.stamp, step=self._step)

    def _activation(self, *, is_eval: bool = False) -> Activation:
        targets = self._num_micro * ROWS * (LENGTH - 1)
        return Activation(
            stamp=self._now(),
            micro=0 if is_eval else self._micro,
            num_micro=1 if is_eval else self._num_micro,
            num_targets=ROWS * (LENGTH - 1) if is_eval else targets,
            is_eval=is_eval,
        )

    def _numbers(self) -> Mapping[str, np.ndarray]:
        # Of like size for all, as gradients of honest devices are: see step/top_gradients.py.
        base = 1.0 + (ord(self.name[0]) + 7 * self._step + self._micro) % 11 / 11
        hidden = np.full((ROWS, LENGTH, HIDDEN), base, np.float32)
        return {"hidden": hidden, **whole_rows()}

    def _report(self) -> StepReport:
        sequences = self._num_micro * ROWS
        return StepReport(
            stamp=self._now(),
            loss=1.0,
            num_targets=sequences * (LENGTH - 1),
            num_sequences=sequences,
            num_tokens=sequences * LENGTH,
            compute_s=0.1,
            wait_s=0.1,
            peak_bytes=9,
        )

    def _say(self, message: Any, tensors: Mapping[str, np.ndarray] = {}) -> None:
        self.due.append((message, tensors))


def whole_rows() -> dict[str, np.ndarray]:
    """Return the integers beside hidden states, all of them allowed."""
    return {
        "lengths": np.full(ROWS, LENGTH, np.int32),
        "labels": np.full((ROWS, LENGTH), 5, np.int32),
    }


class Pen:
    """A gateway without a network: what it would write is written, what it would read is read."""

    address = "nowhere"

    def __init__(self) -> None:
        self.script: Iterator[list[Event]] = iter(())
        self.puppets: dict[str, Puppet] = {}
        """Whoever is here."""
        self.queued_bytes: dict[str, int] = {}
        """What a device was sent and never confirms, by device."""
        self.most_queued_bytes = 0
        self.told: deque[str] = deque(maxlen=1000)
        """Reasons that devices were given, the latest."""
        self._left: list[Event] = []
        self.now_s = 0.0

    def clock(self) -> float:
        """Return a time that goes on with the loop."""
        return self.now_s

    def devices(self) -> list[str]:
        """Return who is here."""
        return sorted(self.puppets)

    def stats(self, device: str) -> DeviceStats:
        """Return what is known of a connection."""
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
            queued_bytes=self.queued_bytes.get(device, 0),
        )

    def events(self, timeout_s: float) -> list[Event]:
        """Return what the script has next."""
        self.now_s += 0.01
        left, self._left = self._left, []
        return left or next(self.script)

    def send(
        self, device: str, message: Any, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Write the message as for the wire, and let the device have it."""
        puppet = self._find(device)
        outgoing = OutgoingMessage(message, tensors)
        for number in range(outgoing.num_packets):
            size = outgoing.packet_bytes(number) - (0 if number else len(outgoing.head))
            outgoing.write_chunk(number, np.empty(size, np.uint8))
        if device not in HONEST:
            self.queued_bytes[device] = self.queued_bytes.get(device, 0) + outgoing.total
            self.most_queued_bytes = max(self.most_queued_bytes, self.queued_bytes[device])
        text = getattr(message, "reason", getattr(message, "text", None))
        if text is not None:
            self.told.append(text)
        puppet.take(message, {name: array for name, (array, _) in tensors.items()})

    def set_limits(self, device: str, max_message_bytes: int) -> None:
        """Take note of nothing."""
        self._find(device)

    def drop(self, device: str, reason: str) -> None:
        """End a session."""
        self._find(device)
        self.leave(device, reason)

    forget = drop

    def leave(self, device: str, reason: str) -> None:
        """Let a device go."""
        self.told.append(reason)
        self.puppets.pop(device)
        self.queued_bytes.pop(device, None)
        self._left.append(Left(device, reason))

    def wake(self) -> None:
        """Do nothing: nobody sleeps."""

    def close(self) -> None:
        """Do nothing."""

    def _find(self, device: str) -> Puppet:
        if device not in self.puppets:
            raise PeerGone(f"device {device!r} has no session")
        return self.puppets[device]


def arriving(device: str, message: Any, tensors: Mapping[str, np.ndarray]) -> Event:
    """What the gateway makes of a message: itself, or what was wrong with it."""
    try:
        specs = tuple(
            headers.TensorSpec(name, str(array.dtype), array.shape)
            for name, array in tensors.items()
        )
        read, _ = headers.decode_header(headers.encode_header(message, specs))
        check_tensors(read, tensors)
    except (LocalProtocolError, RemoteProtocolError) as error:
        return Rejected(device, str(error))
    return Received(device, Envelope(read, dict(tensors)))


# ---- what they send ------------------------------------------------------------------------------


class Case(NamedTuple):
    """A message that nobody expects."""

    kind: type
    fields: dict[str, Any]
    stamp: Stamp | None
    """None: the right one."""
    tensors: dict[str, np.ndarray]


def extreme(draw: random.Random, hint: Any, depth: int = 0) -> Any:
    """Return a value of the type *hint* that nobody expects."""
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        kind: Any = hint
        return kind(**{name: extreme(draw, one, depth + 1) for name, one in hints.items()})
    if typing.get_origin(hint) is tuple:
        length = draw.choice([0, 1, 2, 3, 3, 5 if args[0] is str else 1000])
        return tuple(extreme(draw, args[0], depth + 1) for _ in range(length))
    if typing.get_origin(hint) is dict:
        return {draw.choice(TEXTS): extreme(draw, args[1], depth + 1) for _ in range(3)}
    if type(None) in args:
        return None if draw.random() < 0.5 else extreme(draw, args[0], depth + 1)
    return draw.choice({int: INTEGERS, float: FLOATS, str: TEXTS, bool: [False, True]}[hint])


# Whether it is one of an evaluation is drawn, so that both are sent.
HONEST_FIELDS: dict[str, Any] = {
    **{name: value for name, value in test_any_message.HONEST.items() if name != "is_eval"},
    "pooled": (),
    "samples": (),
    "starts": (),
    "wanted": (),
    "replays": (),
}
_SIZES = {"B": ROWS, "C": ROWS, "T": LENGTH, "D": HIDDEN, "W": ROWS * LENGTH, "N": 9, "R": 2}


def drawn_case(seed: int) -> Case:
    """Return a message that is honest but for a few fields, or hardly; its seed decides."""
    draw = random.Random(seed)
    kind = draw.choice(FROM_DEVICE)
    hints = typing.get_type_hints(kind)
    del hints["stamp"]
    changed = set(draw.sample(sorted(hints), min(len(hints), draw.choice([0, 1, 1, 2, 9]))))
    fields = {
        name: HONEST_FIELDS[name]
        if name in HONEST_FIELDS and name not in changed
        else extreme(draw, hint)
        for name, hint in hints.items()
    }
    stamp = draw.choice([None, None, None, extreme(draw, Stamp)])
    return Case(kind, fields, stamp, _drawn_tensors(draw, kind))


def _drawn_tensors(draw: random.Random, kind: type) -> dict[str, np.ndarray]:
    found = {}
    for due in TENSORS.get(kind, ()):
        if due.is_required or draw.random() < 0.7:
            name = due.name if due.ending is None else f"h.{draw.randrange(6)}.x{due.ending}"
            found[name] = _drawn_tensor(draw, due)
    if draw.random() < 0.1:
        found[draw.choice(TEXTS)[:300] or "x"] = np.zeros(3, np.float32)
    if kind is AdapterUpload and draw.random() < 0.5:
        return {}  # as of frozen blocks
    return found


def _drawn_tensor(draw: random.Random, due: Tensor) -> np.ndarray:
    dims = draw.choice(due.dims.replace("...", "D").split("|")).split()
    shape = [_SIZES.get(letter, 2) for letter in dims]
    if draw.random() < 0.2:
        shape[draw.randrange(len(shape))] = draw.choice([0, 1, 3, 70])
    number = draw.choice(NUMBERS) if draw.random() < 0.7 else 0.5
    if due.dtype == "float32":
        return np.full(shape, number, np.float32)
    whole = draw.choice([5, 5, 5, 0, -1, 2**31 - 1, -(2**31), LENGTH])
    least = np.iinfo(due.dtype)
    return np.full(shape, min(max(whole, least.min), least.max), due.dtype)


# ---- the siege -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What has come of a run."""

    outcome: str
    learned: dict[str, str]
    """A hash of everything that each honest device was sent, and of what the run has learned."""
    num_sent: int
    """Messages of hostile devices."""
    reached: set[tuple[str, str]]
    """Messages, each with the state in which the coordinator met it."""
    most_queued_bytes: int
    told: list[str]
    """What devices were told before they had to leave, the latest."""
    unforeseen: list[str]
    """Errors that nobody had foreseen, which the log shows."""
    folder: RunFolder


class Unforeseen(logging.Handler):
    """Collects what the log calls unforeseen."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note a record with its error."""
        self.found.append(logging.Formatter().format(record))


class Siege:
    """One run with hostile devices, which send *cases* and then leave."""

    def __init__(self, coordinator: Coordinator, pen: Pen, cases: Iterator[Case]) -> None:
        self._coordinator, self._pen, self._cases = coordinator, pen, cases
        self._num_come = self._turn = 0
        self._patience: dict[str, int] = {}
        """What each hostile device still does of what is due; below 0, what it has sent besides."""
        self._is_buffered = coordinator.run.__class__.__name__ == "BufferedRun"
        self.num_sent, self.is_over = 0, False
        self.reached: set[tuple[str, str]] = set()
        self.seen = {name: Puppet(name) for name in HONEST}

    def script(self, num_hostile: int) -> Iterator[list[Event]]:
        """Honest devices answer at once; hostile ones do so for a while, and then what they like.

        The honest ones are there first: a round that began with others would be another round.
        """
        for puppet in self.seen.values():
            self._pen.puppets[puppet.name] = puppet
            yield [Joined(puppet.name, "1" * 32), self._hello(puppet)]
        while not self._coordinator.run.state.members.keys() >= set(HONEST):
            yield list(self._answers())
        idle = 0
        while True:
            events = [*self._answers(), *self._attacks(num_hostile)]
            idle = 0 if events else idle + 1
            assert idle < 50, f"the run stands still: {self._coordinator.run.state}"
            yield events

    def _hello(self, puppet: Puppet) -> Event:
        hello = Hello(
            stamp=Stamp(), protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",)
        )
        return arriving(puppet.name, hello, {})

    def _come(self) -> list[Event]:
        name = f"m{self._num_come}"
        self._pen.puppets[name] = Puppet(name)
        self._patience[name] = (5 * self._num_come + 10) % MOST_HONEST  # of every kind, and mixed
        self._num_come += 1
        return [Joined(name, "1" * 32)]

    def _answers(self) -> Iterator[Event]:
        """What honest devices send once each of them has something to say.

        Where nobody waits for anybody, who comes first has a part in the result: here nobody does.
        """
        for name in HONEST:
            if name not in self._pen.puppets:
                assert self._coordinator._executor.outcome, f"{name} was sent away"
                return
        self._turn += 1
        if self._turn % PACE == 0 and all(self.seen[name].due for name in HONEST):
            for name in HONEST:
                while self.seen[name].due:
                    yield arriving(name, *self._fitting(*self.seen[name].due.popleft()))

    def _fitting(self, message: Any, tensors: Mapping[str, np.ndarray]) -> Sent:
        if isinstance(message, Activation) and self._coordinator.learned._config.labels == "device":
            tensors = {name: value for name, value in tensors.items() if name != "labels"}
        return message, tensors

    def _attacks(self, num_hostile: int) -> Iterator[Event]:
        hostile = [puppet for name, puppet in self._pen.puppets.items() if name not in HONEST]
        for _ in range(0 if self.is_over else num_hostile - len(hostile)):
            yield from self._come()
        for puppet in hostile:
            yield from self._attack(puppet)

    def _attack(self, puppet: Puppet) -> Iterator[Event]:
        """Do what is due, or send some messages that are not."""
        name = puppet.name
        if self._patience[name] > 0:
            if not self._is_to_bring(puppet):
                yield from self._obey(puppet)
                return
            if self._coordinator.run.state.phase is Phase.TRAINING:
                return
        self._patience[name] = min(0, self._patience[name])
        case = next(self._cases, None)
        if case is None:
            self.is_over = True
            self._pen.leave(name, "")
            return
        self._patience[name] -= 1
        yield self._attacking(puppet, case)
        if self._patience[name] <= -BURST:
            self._patience[name] = 0
            yield from self._obey(puppet)

    def _is_to_bring(self, puppet: Puppet) -> bool:
        """Whether the next thing due is what it must not do."""
        return bool(puppet.due) and isinstance(puppet.due[0][0], AdapterUpload)

    def _obey(self, puppet: Puppet) -> Iterator[Event]:
        if not puppet.has_greeted:
            puppet.has_greeted = True
            self._patience[puppet.name] -= 1
            yield self._hello(puppet)
        elif puppet.due:
            if self._is_to_bring(puppet):
                self._pen.leave(puppet.name, "a hostile device has nothing to bring")
                return
            message, tensors = self._fitting(*puppet.due.popleft())
            self._patience[puppet.name] -= 1
            if not self._counts(message):
                yield arriving(puppet.name, message, tensors)
        elif self._is_buffered:
            self._patience[puppet.name] -= 1  # it has nothing to do any more

    def _attacking(self, puppet: Puppet, case: Case) -> Event:
        message = case.kind(stamp=case.stamp or self._right(puppet), **case.fields)
        tensors = dict(case.tensors)
        if self._counts(message):  # by the samples that it stands for, whatever it brings
            tensors["surplus"] = np.zeros(1, np.float32)
        state = self._coordinator._handlers._state_of(puppet.name).name
        phase = self._coordinator.run.state.phase.name
        self.reached.add((case.kind.__name__, f"{state} {phase}"))
        self.num_sent += 1
        return arriving(puppet.name, message, tensors)

    def _counts(self, message: Any) -> bool:
        """Whether a message, if it is taken, has a share in what all learn."""
        if self._is_buffered and isinstance(message, Activation):
            return not message.is_eval
        return isinstance(message, AdapterUpload)

    def _right(self, puppet: Puppet) -> Stamp:
        due = puppet.due[0][0] if puppet.due else None
        return puppet.stamp if due is None else due.stamp


def run_under_siege(
    served: tuple[ServeConfig, ServerModel],
    folder: Path,
    cases: Iterator[Case],
    num_hostile: int = NUM_HOSTILE,
) -> Outcome:
    """Let hostile devices send *cases* into a run; return what it has come to."""
    config, model = served
    run_folder, pen = RunFolder.create(folder, "run"), Pen()
    coordinator = Coordinator(
        config, model, run_folder, pen, Watchers(), "run-1", pool=Now(), clock=pen.clock
    )
    siege = Siege(coordinator, pen, cases)
    siege.is_over = not num_hostile
    pen.script = siege.script(num_hostile)
    unforeseen, log = Unforeseen(), logging.getLogger("coordinator.rounds.admission")
    log.addHandler(unforeseen)
    try:
        with patch("os.fsync", lambda _file: None):  # no power is cut here
            outcome = coordinator.serve()
    finally:
        log.removeHandler(unforeseen)
    learned = {name: puppet.seen.hexdigest() for name, puppet in siege.seen.items()}
    for part, arrays in coordinator.learned.state().items():
        learned[part] = _hash_of(arrays)
    return Outcome(
        outcome=outcome,
        learned=learned,
        num_sent=siege.num_sent,
        reached=siege.reached,
        most_queued_bytes=pen.most_queued_bytes,
        told=list(pen.told),
        unforeseen=unforeseen.found,
        folder=run_folder,
    )


def _hash_of(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        if not name.split(":")[0].startswith("m"):
            found.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()
