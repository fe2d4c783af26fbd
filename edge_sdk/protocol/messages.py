"""Every message that a device and the coordinator exchange; the protocol's dictionary.

Frozen dataclasses without behaviour. How they become bytes is `headers.py`, how they are delivered
in order and exactly once is `channel.py`. Tensors travel beside a message, by name: `carries` says
which.

Legend: B sequences, C some of them, T positions of the longest, D hidden size, R rank, I inputs,
O outputs, S rank of the frozen residual, E experts of a weight that is a stack of them, N bytes,
W positions that are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from edge_sdk.names import ModelHash, PartBytes, RunName, Sha256
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.protocol.tensors import Tensor, carries
from profiler.profile import DeviceProfile

PROTOCOL_VERSION = 1

FACTORS = (
    Tensor("<weight>.A", "R I|E R I", "A factor of an adapted weight.", partner=".B"),
    Tensor("<weight>.B", "O R|E O R", "The other one.", partner=".A"),
)
RESIDUAL = (
    Tensor("<weight>.U", "O S|E O S", "A factor of the weight's frozen residual.", partner=".V"),
    Tensor("<weight>.V", "S I|E S I", "The other one.", partner=".U"),
)
HEAD = Tensor("<parameter>", "...", "A parameter of a trainable head, under its own name.")


# ---- both ways -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a message belongs to, so that it may be sent twice and is applied once."""

    run: RunName = ""
    """Run id; empty before the coordinator has welcomed the device."""
    device: RunName = ""
    """Name of the device as the coordinator registered its key."""
    round: int = 0
    """Aggregation round, from 0."""
    step: int = 0
    """Optimizer step since the start of the run, from 0."""
    attempt: int = 0
    """Rounds started so far, those given up included; answers to an earlier one are stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The sender could not do what was asked, or was sent something it cannot accept."""

    stamp: Stamp
    error: str
    """Class name from `errors.py`; a device asks for a smaller plan with `OutOfMemory`."""
    text: str
    is_fatal: bool = True


@carries(Tensor("data", "N", "Bytes that mean nothing.", dtype="uint8", is_required=False))
@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Bytes by which a device measures its link; the answer brings as many as were asked for."""

    stamp: Stamp
    answer_bytes: int = 0
    """Size of `data` in the coordinator's answer; 0 in the answer itself."""


# What a Probe may bring and ask for: what a device may send before it has a plan.
MAX_PROBE_BYTES = 1024 * 1024
# In one session. A device needs about half of them to measure once.
MAX_PROBES = 48


# ---- device -> coordinator -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of a session: who the device is and what it can do. Device -> coordinator."""

    stamp: Stamp
    protocol: int
    sdk_version: str
    codecs: tuple[str, ...]
    """Tensor codecs this device can read and write, best first."""
    model_hash: ModelHash = ""
    """Expected model; empty takes whatever the coordinator serves."""
    backend: str = "torch"
    """What computes on the device: `torch`, or `onnxruntime` or `onnxruntime-training`, which are
    sent graphs as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """What the run may use of this device; asked for by `Welcome`. Device -> coordinator."""

    stamp: Stamp
    profile: DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRequest:
    """Request for the bytes of a part from `offset` on. Device -> coordinator."""

    stamp: Stamp
    sha256: Sha256
    offset: PartBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The plan is in place; the device waits for a round. Device -> coordinator."""

    stamp: Stamp
    vocab_size: int
    """Tokens the device's tokenizer knows; must fit the model's embeddings."""
    num_samples: int
    """Training samples on the device."""
    held_steps: tuple[int, ...]
    """Steps of the run at which this device holds a checkpoint of its own."""
    left_out: int = 0
    """Rows that the device skips or drops, by its own settings."""
    cut: int = 0
    """Samples that the device cuts to the longest sequence."""
    looks_ahead: bool = False
    """Whether the device takes a `TopHidden` before the `Gradient` of the micro-batch before."""
    marks: bool = False
    """Whether the device takes a Pause that `goes_on`."""
    skips: bool = False
    """Whether the device takes a `RoundSkipped`."""


@carries(
    Tensor(
        "hidden",
        "C T D",
        "Of all sequences, in their order, but those in `replays`.",
        is_required=False,
    ),
    Tensor("lengths", "B", "Real positions; sequences are padded on the right.", dtype="int32"),
    Tensor(
        "labels",
        "B T | B",
        "With `labels: server`: -100 where no loss is taken; (B) are class numbers.",
        dtype="int32",
        is_required=False,
    ),
    Tensor("ids", "B T", "Where `Welcome` asks for them.", dtype="int32", is_required=False),
    Tensor(
        "rest",
        "W T D",
        "With `starts`: to be added to the sequences that start from zeros, in their order.",
        is_required=False,
    ),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Output of the device's last block for one micro-batch. Device -> coordinator."""

    stamp: Stamp
    micro: int
    num_micro: int
    """Micro-batches of this step; the optimizer steps after the last one."""
    num_targets: int
    """Targets of the whole step: its loss is the sum over them divided by this number."""
    is_eval: bool = False
    pooled: tuple[int, ...] = ()
    """Where a decoder's classification head looks in each sequence; empty: at its last token.
    Another place only where a text ends in the padding token, with `labels: server`."""
    samples: tuple[int, ...] = ()
    """Number of each sequence's sample among those of the device; empty where neither `starts` nor
    `Welcome.replays` asks for it."""
    starts: tuple[int, ...] = ()
    """With the codec `residual`: `hidden` is what has changed since what both sides hold of the
    sample, which for each sequence is named by its hash; 0: zeros. Empty: `hidden` is all of it."""
    wanted: tuple[int, ...] = ()
    """With `labels: device`, the positions for which the device wants the `TopHidden` and will send
    the `TopGradient`: those that predict a target. Counted row by row, runs as first position and
    last + 1, ascending; empty: all."""
    replays: tuple[int, ...] = ()
    """Sequences, by their place, of whose samples the coordinator has kept the state."""


@carries(Tensor("grad", "B T D|W D", "Of the positions that were `wanted`, in their order."))
@dataclass(frozen=True, slots=True, kw_only=True)
class TopGradient:
    """Gradient of the device's loss by the top hidden state. Device -> coordinator.

    Only with `labels: device`.
    """

    stamp: Stamp
    micro: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """An optimizer step is done on the device. Device -> coordinator."""

    stamp: Stamp
    loss: float
    """Mean loss per target of the step."""
    num_targets: int
    num_sequences: int
    num_tokens: int
    """Real tokens, padding excluded."""
    compute_s: float
    wait_s: float
    peak_bytes: int


@carries(*FACTORS, HEAD)
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUpload:
    """The device's own factors at the end of a round. Device -> coordinator.

    Where the run has an `exchange`, A and B are what has to be added to the factors that the
    coordinator has.
    """

    stamp: Stamp
    importance: dict[str, float] = field(default_factory=dict)
    """Importance of each weight of the plan, mean of the steps of the round that measured it, for
    the device's mean token loss; empty where none did. Not divided by any cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The device went through its private validation data. Device -> coordinator."""

    stamp: Stamp
    loss_sum: float
    num_targets: int
    num_correct: int
    """Targets whose most likely prediction was right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """The device has checkpointed itself at `stamp.step`. Device -> coordinator."""

    stamp: Stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """The device leaves on purpose. Device -> coordinator."""

    stamp: Stamp
    reason: str
    stays: bool = False
    """Whether it goes on for some seconds, until a Pause lets it save itself in mid-round."""


# ---- coordinator -> device -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The device is in; what the run is about. Coordinator -> device."""

    stamp: Stamp
    protocol: int
    sdk_version: str
    model_hash: ModelHash
    num_blocks: int
    files: Part
    """Config and tokenizer of the model."""
    task: str
    """`causal-lm` or `sequence-classification`."""
    labels: str
    """`server` or `device`: who sees the labels."""
    codec: str
    """How hidden states and their gradients travel."""
    max_length: int
    """Longest sequence in tokens; longer ones are cut or refused, as the data config says."""
    num_labels: int
    """Classes of a classifier; 0 for a causal LM."""
    vocab_size: int
    """Rows of the model's embedding; token ids lie below."""
    pad_id: int
    """Token that fills up a micro-batch."""
    training: dict[str, str]
    """The run's training configuration, as the `key=value` pairs of docs/configuration.md."""
    lora: dict[str, str]
    """The run's LoRA configuration, likewise."""
    wants_profile: bool = False
    """Whether the plan waits for the device's `Profiled`."""
    importance: str = "free"
    """Which form of importance is measured: `free`, `reference` or `signed`."""
    importance_every: int = 0
    """Steps between two measurements; 0 for none."""
    label_names: tuple[str, ...] = ()
    """Classes of a classifier, in the order of their numbers."""
    exchange: str = ""
    """Codec in which changes of factors and of residuals travel, each against what the other side
    has; empty where factors and changes travel as they are."""
    parts: dict[str, Sha256] = field(default_factory=dict)
    """SHA-256 of every part of the model by its name, of which `model_hash` is made; version 0.1.0
    tells none."""
    replays: bool = False
    """Whether hidden states of frozen blocks are kept, so that they are sent once."""
    wants_ids: bool = False
    """Whether token ids come with every activation, as later blocks of the model need them; only
    with `labels: server`."""
    held_bytes: int = 0
    """Most bytes of hidden states that each side holds of the device's samples, with the codec
    `residual`."""
    holds: bool = False
    """Whether a device that leaves a round gets a Pause first, if its Goodbye says `stays`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The device may not take part; it should not try again unchanged. Coordinator -> device."""

    stamp: Stamp
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAssigned:
    """What the device is to run, and the parts of the model it needs. Coordinator -> device."""

    stamp: Stamp
    plan: Plan
    parts: tuple[Part, ...]
    codec: str = ""
    """How hidden states and their gradients travel under this plan; empty: as `Welcome` says."""


@carries(Tensor("data", "N", "The bytes from `offset` on.", dtype="uint8"))
@dataclass(frozen=True, slots=True, kw_only=True)
class PartData:
    """A stretch of a part. Coordinator -> device."""

    stamp: Stamp
    sha256: Sha256
    offset: PartBytes
    total_bytes: PartBytes


@carries(*FACTORS, *RESIDUAL, HEAD)
@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStart:
    """Train steps `stamp.step` .. `end_step` - 1, then upload. Coordinator -> device.

    Without steps (`end_step` = `stamp.step`) there is nothing to train and nothing to upload.

    A device that starts or restarts (`is_full`) gets factors and frozen residual of every weight;
    the others get what the aggregation changed, with the *change* of the residual in U and V.

    Where the run has an `exchange`, U and V are what the device has been given so far (`is_full`),
    or is given now; its residual is all of that, and `kept` - 1 times the product of its factors as
    the coordinator has them. A and B are these factors (`is_full`), or what is added to them.
    """

    stamp: Stamp
    end_step: int
    is_full: bool
    restore_step: int = -1
    """Step of the device's own checkpoint to continue from, as if nothing had happened; -1 for what
    this message brings."""
    restarts: bool = False
    """Whether the optimizer begins without moments."""
    evaluate: bool = False
    """Whether to go through the private validation data before training, and report."""
    kept: float = 0.0
    """Share of the product of its own factors that the device goes on to compute with; only where
    the run has an `exchange`."""
    most_rank: int = 0
    """Ranks in which the device keeps what it has been given of a weight; likewise."""
    schedule_step: int = -1
    """Step of the run's schedule at which the first of these steps stands, where that is not the
    device's own count; -1: `stamp.step`."""


@carries(
    Tensor("grad", "B T D", "None where all its ranks are 0: its blocks rest.", is_required=False)
)
@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Gradient of the device's loss by the hidden state it sent. Coordinator -> device."""

    stamp: Stamp
    micro: int
    loss_sum: float
    """Sum of the losses of this micro-batch's targets; 0 when the device computed them itself."""
    kept: bool = False
    """Whether the state of every sample of the micro-batch is kept, and need not be sent again
    while the device's blocks stay as they are."""


@carries(
    Tensor(
        "hidden",
        "B T D|W D",
        "Of the positions that the `Activation` has `wanted`, in their order; of all where it "
        "named none. Version 0.1.0 always sends all.",
    )
)
@dataclass(frozen=True, slots=True, kw_only=True)
class TopHidden:
    """Hidden state after the server's last block; `labels: device`. Coordinator -> device."""

    stamp: Stamp
    micro: int
    is_eval: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resend:
    """Send a micro-batch's Activation again, without `starts` that are not held here.

    Coordinator -> device.
    """

    stamp: Stamp
    micro: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Loss of one evaluated micro-batch; `labels: server`. Coordinator -> device."""

    stamp: Stamp
    micro: int
    loss_sum: float
    num_targets: int
    num_correct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Checkpoint yourself at `stamp.step` and wait for my return. Coordinator -> device."""

    stamp: Stamp
    goes_on: bool = False
    """Whether to go on with that step instead; only for a device whose Ready says `marks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSkipped:
    """The round of `stamp` goes on without this device, which waits. Coordinator -> device."""

    stamp: Stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOver:
    """The run has ended; nothing more will come. Coordinator -> device."""

    stamp: Stamp
    reason: str


FromDevice = (
    Hello
    | Profiled
    | PartRequest
    | Ready
    | Activation
    | TopGradient
    | StepReport
    | AdapterUpload
    | EvalReport
    | Paused
    | Goodbye
    | Probe
    | Failure
)
FromCoordinator = (
    Welcome
    | Refused
    | PlanAssigned
    | PartData
    | RoundStart
    | Gradient
    | TopHidden
    | Resend
    | EvalResult
    | Pause
    | RoundSkipped
    | RunOver
    | Probe
    | Failure
)
Message = FromDevice | FromCoordinator

FROM_DEVICE: tuple[type, ...] = get_args(FromDevice)
FROM_COORDINATOR: tuple[type, ...] = get_args(FromCoordinator)
MESSAGES: dict[str, type] = {kind.__name__: kind for kind in get_args(Message)}
