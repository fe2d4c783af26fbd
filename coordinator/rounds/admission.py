"""Who may take part, and with which plan.

It answers Hello and Ready, and refuses with a reason that a person can act on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol

from coordinator.config.run import AUTO, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Gateway
from coordinator.planning.costs import UNKNOWN_CODEC
from coordinator.results.events.devices import DeviceStatus
from coordinator.rounds.intake.allowance import Allowance
from coordinator.rounds.plans.desk import PlanningDesk
from coordinator.rounds.run import Run
from coordinator.rounds.state import Member
from edge_sdk.client.backends import BACKENDS, Backend
from edge_sdk.client.checkpoints import KEPT
from edge_sdk.errors import (
    ConfigError,
    EdgeError,
    LocalProtocolError,
    PeerGone,
    RefusedError,
    is_out_of_memory,
    public_name,
    public_text,
)
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    Failure,
    Hello,
    Message,
    Pause,
    PlanAssigned,
    Ready,
    Refused,
    RoundSkipped,
    RoundStart,
    RunOver,
    Stamp,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.training import to_pairs
from edge_sdk.transport.link import NO_TENSORS, package_version

log = logging.getLogger(__name__)

# Bytes for headers and alignment of a message, beside its tensors.
MESSAGE_SLACK_BYTES = 1024 * 1024
# A device may join again after so many errors that nobody foresaw; one more, and it is refused.
MOST_UNFORESEEN = 2
# Messages of which nothing was said by a device first.
_OF_THE_RUN = (Welcome, PlanAssigned, RoundStart, Pause)


class Onlookers(Protocol):
    """Those who look on at a run, as far as they may fail."""

    failure: Exception | None
    """What one of them has raised."""


class Admission:
    """Decides who may take part, and tells every device its plan."""

    def __init__(
        self,
        config: ServeConfig,
        model: ServerModel,
        gateway: Gateway,
        planner: PlanningDesk,
        run: Run,
        watchers: Onlookers,
    ) -> None:
        self._config, self._model, self._gateway = config, model, gateway
        self._planner, self._run, self._watchers = planner, run, watchers
        self.plans: dict[str, Plan] = {}
        self.codecs: dict[str, str] = {}
        self.held_steps: dict[str, tuple[int, ...]] = {}
        """Steps of which a device has a checkpoint of its own."""
        self._spoken: dict[str, tuple[str, ...]] = {}
        """Codecs that a device can read and write."""
        self._backends: dict[str, Backend] = {}
        self._waiting: set[str] = set()
        """Devices whose graphs are still being made, or whose plan may change in a moment."""
        self.leaving: set[str] = set()
        """Devices that are told why they must leave; what else they send is not looked at."""
        self.allowance = Allowance(time.monotonic)
        run.may_tell = self.allowance.may_tell
        """How often each key may send what nobody asked it for."""
        self.sessions: Counter[str] = Counter()
        """The number of each device's session: another one for each that begins or ends."""
        self._unforeseen: dict[str, int] = {}
        """Errors that nobody foresaw, by the device whose part they ended."""

    def greet(self, device: str, hello: Hello) -> None:
        """Answer a Hello with a welcome, and with a plan where nothing is to be planned.

        Raises:
            RefusedError: the device cannot take part.
        """
        if self._run.conduct.is_over(device):
            raise RefusedError(
                f"this device broke the rules of this run {self._run.conduct.expulsions[device]} "
                "times; see why in the coordinator's log, and let it join the next run"
            )
        if hello.protocol != PROTOCOL_VERSION:
            raise RefusedError(
                f"protocol version {hello.protocol}, this coordinator speaks {PROTOCOL_VERSION}; "
                f"install edgesplit {package_version()} on both sides"
            )
        if hello.model_hash not in ("", self._model.hash):
            raise RefusedError(
                f"the device expects model {hello.model_hash[:12]}..., this run trains "
                f"{self._model.hash[:12]}...; correct or remove `model_hash`"
            )
        if hello.backend not in BACKENDS:
            raise RefusedError(
                f"backend {hello.backend!r} is not known here; this coordinator serves "
                f"{' and '.join(BACKENDS)}"
            )
        self._spoken[device] = hello.codecs
        wanted = self._config.settings(device).codec or AUTO
        self.codecs[device] = self._codec(device, UNKNOWN_CODEC if wanted == AUTO else wanted)
        self._backends[device] = BACKENDS[hello.backend]
        self._deliver(device, self._welcome(device))
        if self._planner.is_fixed:
            self.assign(device)

    def assign(self, device: str) -> None:
        """Tell a device what to run, if that is known by now.

        Raises:
            RefusedError: it cannot take part.
            ConfigError: the config asks for what nobody can do.
        """
        if device not in self._backends:  # nor has it said Hello in this session
            return
        self._waiting.discard(device)
        if self._planner.is_open(device):  # nobody begins with what may not hold for long
            self._waiting.add(device)
            return
        plan = self._planner.plan_in_force(device)
        if plan is None:
            return
        self.plans[device] = plan
        self._gateway.set_limits(device, self._largest_message(plan))
        parts = self._model.parts_for(plan)
        if self._backends[device].wants_graphs:
            graphs = self._model.graphs_for(plan)
            if graphs is None:
                self._waiting.add(device)
                return
            parts = (*parts, graphs)
        codec = self.codecs[device] = self._codec(device, self._planner.codec(device, plan))
        assigned = PlanAssigned(stamp=self._stamp(device), plan=plan, parts=parts, codec=codec)
        self._deliver(device, assigned)

    def _stamp(self, device: str) -> Stamp:
        """Return a stamp of what belongs to no round."""
        return Stamp(run=self._run.id, device=device)

    def _codec(self, device: str, wanted: str) -> str:
        """Return *wanted* where the device speaks it."""
        spoken = self._spoken[device]
        if wanted in spoken:
            return wanted
        if "float32" not in spoken:
            raise RefusedError(f"no common codec: the device speaks {', '.join(spoken)}")
        return "float32"

    def _welcome(self, device: str) -> Welcome:
        config, model = self._config, self._model
        training = to_pairs(config.training) | {"total_steps": str(config.total_steps)}
        return Welcome(
            stamp=self._stamp(device),
            protocol=PROTOCOL_VERSION,
            sdk_version=package_version(),
            model_hash=model.hash,
            num_blocks=model.facts.layout.num_blocks,
            files=model.parts["files"],
            task=config.task,
            labels=config.labels,
            codec=self.codecs[device],
            max_length=model.max_length,
            num_labels=len(config.label_names),
            vocab_size=model.text_config.vocab_size,
            pad_id=model.text_config.pad_token_id or 0,
            training=training,
            lora=to_pairs(config.lora),
            wants_profile=not self._planner.is_fixed,
            importance=config.planning.importance,
            importance_every=config.planning.importance_every * config.planning.measures_importance,
            exchange="" if config.exchange.is_plain else config.exchange.codec,
            wants_ids=model.facts.layout.needs_ids and config.labels == "server",
            held_bytes=config.held_bytes,
            holds=True,
            label_names=config.label_names,
            replays=config.replay.applies(config.labels),
            parts={name: part.sha256 for name, part in model.parts.items()},
        )

    def _largest_message(self, plan: Plan) -> int:
        """Return the bytes of the largest message that the plan can make a device send."""
        tokens = plan.micro_batch * self._model.max_length
        layout = self._model.facts.layout
        activation: int = 4 * tokens * (layout.width + 2 + layout.needs_ids)
        targets = self._model.facts.targets
        upload = sum(4 * rank * sum(targets[name]) for name, rank in plan.ranks.items())
        tail = 2 * self._model.parts["tail"].num_bytes if self._config.label_names else 0
        return max(activation, upload + tail) + MESSAGE_SLACK_BYTES

    def admit(self, device: str, ready: Ready) -> Member:
        """Return the member that a ready device becomes.

        Raises:
            RefusedError: its data or tokenizer does not fit.
        """
        plan, rows = self.plans[device], self._model.text_config.vocab_size
        if not 0 < ready.vocab_size <= rows:
            raise RefusedError(
                f"the device's tokenizer knows {ready.vocab_size} tokens, the model {rows}"
            )
        if ready.num_samples < 1:
            raise RefusedError("the device has no training samples")
        self.held_steps[device] = ready.held_steps
        return Member(
            name=device,
            split=plan.split,
            batch_size=plan.batch_size,
            num_micro=plan.batch_size // plan.micro_batch,
            is_local=plan.split == self._model.facts.layout.num_blocks,
            looks_ahead=ready.looks_ahead,
            marks=ready.marks,
            skips=ready.skips,
        )

    def holds(self, device: str, step: int) -> None:
        """Remember that *device* keeps a checkpoint of *step*, where its round starts."""
        held = self.held_steps.get(device, ())
        if step not in held:
            self.held_steps[device] = (*held, step)[-KEPT:]

    def assign_waiting(self) -> None:
        """Send their plans to devices that have had to wait for them, where nothing lacks now."""
        for device in sorted(self._waiting):
            with self.part_of(device):
                self.assign(device)

    # ---- devices go ----

    def is_here(self, device: str) -> bool:
        """Return whether a device has a session."""
        return device in self._gateway.devices()

    def forget(self, device: str) -> None:
        """Let go of what a session was told: a device says Hello again in the next one."""
        self.sessions[device] += 1
        for known in (self.codecs, self._spoken, self.plans, self.held_steps, self._backends):
            known.pop(device, None)
        self._waiting.discard(device)
        self.leaving.discard(device)

    def is_known(self, device: str) -> bool:
        """Return whether a device has said Hello in its session."""
        return device in self.codecs

    def silent(self, device: str, seconds: float) -> None:
        """Show that nothing has been heard of a device; the gateway ends its session in time."""
        left_s = max(0.0, self._config.patience_s - seconds)
        status = f"silent for {seconds:.0f} s; without a sign of life it is lost in {left_s:.0f} s"
        self._run.watcher.see(DeviceStatus(device, status, is_delay=True))

    @contextmanager
    def part_of(self, device: str) -> Iterator[None]:
        """Let what goes wrong inside end the part of *device* alone, unless the trouble is ours.

        What it is to blame for it is told, and it leaves. An error that nobody foresaw is shown in
        the log; the device is not blamed for it, and may join again.

        Raises:
            EdgeError: ours, as are OSError and MemoryError: a full disk, a wrong configuration. So
                is whatever a watcher has raised.
        """
        try:
            yield
        except PeerGone as gone:
            self._run.lose(device, str(gone))
        except LocalProtocolError as error:
            self._let_go(device, error)
        except EdgeError as error:
            if not error.blames_peer:
                raise
            self.expel(device, error)
        except Exception as error:
            is_ours = isinstance(error, OSError) or is_out_of_memory(error)
            if is_ours or error is self._watchers.failure:
                raise
            self._let_go(device, error)

    def _let_go(self, device: str, error: Exception) -> None:
        """End the part of a device that led to *error*, which nobody foresaw; it may join again."""
        log.error("device.unforeseen device=%s", device, exc_info=error)
        text = f"the coordinator failed at what it sent: {type(error).__name__}: {error}"
        self._unforeseen[device] = self._unforeseen.get(device, 0) + 1
        if self._unforeseen[device] > MOST_UNFORESEEN:
            self.expel(device, EdgeError(text))
            return
        self._run.lose(device, text)  # what it has sent meanwhile is late
        with suppress(PeerGone):
            self._gateway.forget(device, public_text(text))

    def expel(self, device: str, error: EdgeError) -> None:
        """Let go of a device that did what it must not; it is told, and the others go on."""
        if not isinstance(error, RefusedError):
            self._run.conduct.expelled(device)
        text = public_text(error)
        log.info("device.refused device=%s reason=%s", device, text)
        self._run.lose(device, f"{public_name(error)}: {text}")
        self.leaving.add(device)
        stamp = self._stamp(device)
        last: Message = Failure(stamp=stamp, error=public_name(error), text=text)
        if isinstance(error, RefusedError):
            last = Refused(stamp=stamp, reason=text)
        try:
            self._gateway.send(device, last)
            self._gateway.drop(device, text)
        except PeerGone:
            self.leaving.discard(device)
        except Exception:  # whatever it is: it must not reach those who stay
            log.exception("device.untold device=%s", device)

    def send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Send a message to a device; it is lost if the device has no session.

        That the device has left, and why, comes as an event of its own.
        """
        with self.part_of(device), suppress(PeerGone):
            self._deliver(device, message, tensors)

    def skip_round(self, device: str) -> None:
        """Tell a device that the round goes on without it, if its version knows of such."""
        if self._run.state.ready[device].skips:
            self.send(device, RoundSkipped(stamp=self._run.stamp(device)))

    def _deliver(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Send a message; where no message can hold what the run wants to say, that is its fault.

        Raises:
            PeerGone: the device has no session.
            ConfigError: the run is too large for a message.
        """
        self.allowance.asked(device, message)
        try:
            self._gateway.send(device, message, tensors)
        except LocalProtocolError as error:
            if isinstance(message, _OF_THE_RUN):
                raise ConfigError(
                    f"what device {device} is to be told fits no message: {error}; train fewer "
                    "weights (lora.target_modules)"
                ) from error
            raise

    def end(self, reason: str) -> None:
        """Tell every device that the run is over, and why."""
        for name in self._gateway.devices():
            self.send(name, RunOver(stamp=self._run.stamp(name), reason=reason))
