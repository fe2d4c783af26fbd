"""Who may take part, with which plan; and the parts of the model that they fetch.

It answers Hello, Ready and PartRequest, and refuses with a reason that a person can act on.
"""

from __future__ import annotations

import logging

import numpy as np

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Gateway
from coordinator.planning.run_planner import Planner
from coordinator.rounds.state import Member
from edge_sdk.client.checkpoints import KEPT
from edge_sdk.errors import EdgeError, RefusedError, public_name
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    Failure,
    Hello,
    PartData,
    PartRequest,
    PlanAssigned,
    Ready,
    Refused,
    Stamp,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.training import to_pairs
from edge_sdk.transport.link import package_version

log = logging.getLogger(__name__)

# Bytes of one answer to a PartRequest: enough to hide the round trip, little for a device's memory.
PART_DATA_BYTES = 4 * 1024 * 1024
# Bytes for headers and alignment of a message, beside its tensors.
MESSAGE_SLACK_BYTES = 1024 * 1024
BACKENDS = ("torch", "onnxruntime")


class Admission:
    """Decides who may take part, and tells every device its plan."""

    def __init__(
        self,
        config: ServeConfig,
        model: ServerModel,
        gateway: Gateway,
        planner: Planner,
        run_id: str,
    ) -> None:
        self._config, self._model, self._gateway = config, model, gateway
        self._planner, self._run_id = planner, run_id
        self.plans: dict[str, Plan] = {}
        self.codecs: dict[str, str] = {}
        self.held_steps: dict[str, tuple[int, ...]] = {}
        self._backends: dict[str, str] = {}
        self.waiting: set[str] = set()
        """Devices whose plan is known while their graphs are still being made."""

    def greet(self, device: str, hello: Hello) -> None:
        """Answer a Hello with a welcome, and with a plan where nothing is to be planned.

        Raises:
            RefusedError: the device cannot take part.
        """
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
        self.codecs[device] = self._codec(device, hello)
        self._backends[device] = hello.backend
        self._gateway.send(device, self._welcome(device))
        if self._planner.is_fixed:
            self.assign(device)

    def assign(self, device: str) -> bool:
        """Tell a device what to run, if that is known by now.

        Raises:
            RefusedError: it cannot take part.
            ConfigError: the config asks for what nobody can do.
        """
        plan = self._planner.plan(device)
        if plan is None:
            return False
        self.plans[device] = plan
        self._gateway.set_limits(device, self._largest_message(plan))
        parts = self._model.parts_for(plan)
        self.waiting.discard(device)
        if self._backends.get(device) == "onnxruntime":
            graphs = self._model.graphs_for(plan)
            if graphs is None:
                self.waiting.add(device)
                return True
            parts = (*parts, graphs)
        self._gateway.send(device, PlanAssigned(stamp=self.stamp(device), plan=plan, parts=parts))
        return True

    def stamp(self, device: str, round_: int = 0, step: int = 0, attempt: int = 0) -> Stamp:
        """Return a stamp of this run."""
        return Stamp(run=self._run_id, device=device, round=round_, step=step, attempt=attempt)

    def _codec(self, device: str, hello: Hello) -> str:
        wanted = self._config.settings(device).codec
        assert wanted is not None
        if wanted in hello.codecs:
            return wanted
        if "float32" not in hello.codecs:
            raise RefusedError(f"no common codec: the device speaks {', '.join(hello.codecs)}")
        return "float32"

    def _welcome(self, device: str) -> Welcome:
        config, model = self._config, self._model
        training = to_pairs(config.training) | {"total_steps": str(config.total_steps)}
        return Welcome(
            stamp=self.stamp(device),
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
        )

    def _largest_message(self, plan: Plan) -> int:
        """Return the bytes of the largest message that the plan can make a device send."""
        tokens = plan.micro_batch * self._model.max_length
        activation: int = 4 * tokens * (self._model.text_config.hidden_size + 2)
        targets = self._model.facts.targets
        upload = sum(4 * rank * sum(targets[name]) for name, rank in plan.ranks.items())
        tail = 2 * self._model.parts["tail"].num_bytes if self._config.label_names else 0
        return max(activation, upload + tail) + MESSAGE_SLACK_BYTES

    def admit(self, device: str, ready: Ready) -> Member:
        """Return the member that a ready device becomes.

        Raises:
            RefusedError: its data or tokenizer does not fit, or it never said Hello.
        """
        plan = self.plans.get(device)
        if plan is None:
            raise RefusedError("Ready without Hello")
        rows = self._model.text_config.vocab_size
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
        )

    def holds(self, device: str, step: int) -> None:
        """Remember that *device* keeps a checkpoint of *step*, where its round starts."""
        held = self.held_steps.get(device, ())
        if step not in held:
            self.held_steps[device] = (*held, step)[-KEPT:]

    def send_part(self, device: str, request: PartRequest) -> None:
        """Answer a PartRequest with the next stretch of the part."""
        part, data = self._model.read(request.sha256, request.offset, PART_DATA_BYTES)
        self._gateway.send(
            device,
            PartData(
                stamp=request.stamp,
                sha256=part.sha256,
                offset=request.offset,
                total_bytes=part.num_bytes,
            ),
            {"data": (np.frombuffer(data, np.uint8), "uint8")},
        )

    def refuse(self, device: str, error: EdgeError) -> None:
        """Tell a device why it cannot take part, and end its session."""
        log.warning("device.refused device=%s reason=%s", device, error)
        stamp = self.stamp(device)
        if isinstance(error, RefusedError):
            self._gateway.send(device, Refused(stamp=stamp, reason=str(error)))
        else:
            failure = Failure(stamp=stamp, error=public_name(error), text=str(error))
            self._gateway.send(device, failure)
        self._gateway.drop(device, str(error))
