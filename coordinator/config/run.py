"""The configuration of a run: what `coordinator serve --config run.yaml` reads.

It knows no model and no device; what only these can tell is checked in `planning/fixed.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coordinator.aggregation.rules import RULES
from coordinator.config.buffered import BufferedConfig
from coordinator.config.centralised import PooledConfig
from coordinator.config.early_stopping import EarlyStoppingConfig
from coordinator.config.engine import EngineConfig
from coordinator.config.exchange import ExchangeConfig
from coordinator.config.planning import PlanningConfig
from coordinator.config.replay import ReplayConfig
from coordinator.config.scoring import GenerateConfig, Score, check_scores
from coordinator.config.screening import ScreeningConfig
from coordinator.config.tracking import TrackingConfig
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.precision import Base, Compute
from edge_sdk.names import check_folder_name
from edge_sdk.protocol.codecs import float_codecs
from edge_sdk.protocol.plan import MOST_AWAY, Residual
from edge_sdk.protocol.residual import RESIDUAL
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.transport.addresses import check_listened, web_address

AUTO = "auto"
"""The codec that the planner chooses."""

if TYPE_CHECKING:
    from typing_extensions import Self

    Aggregation = str
    Codec = str
else:  # the rules and codecs themselves are the choices
    Aggregation, Codec = Literal[tuple(RULES)], Literal[(*float_codecs(), RESIDUAL, AUTO)]
# Tokens of a wave of what is there, where none are configured: enough for a GPU. With
# `labels: device` all of a wave wait for one another, so that only few micro-batches share one
# that are so small that what a wave costs beside its rows is most of it.
WAVE_TOKENS = {"server": 4096, "device": 256}
Tracker = Literal["tensorboard", "wandb", "mlflow", "prometheus", "csv"]
Preset = Literal["hsplitlora", "splitlora", "hlora", "hetlora", "fedlora", "cenlora", "ft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """What one device runs; a field left out is taken from `default`."""

    split: int | Literal["all"] | None = None
    """Blocks on the device, 1 .. number of blocks; `all` is plain federated LoRA."""
    r: int | None = None
    """Rank of the device's adapters; 0: its blocks stay frozen, it computes forward only."""
    batch_size: int | None = None
    """Sequences of one optimizer step."""
    micro_batch: int | None = None
    """Sequences that pass through the model together; divides batch_size."""
    in_flight: int | None = None
    """Micro-batches under way at the same time, at most 4: with 2, a device computes the next one
    while the coordinator has this one, and keeps what both need for their backward pass; more of
    them help where delays vary."""
    codec: Codec | None = None
    """How hidden states and gradients travel to and from this device; `int8` keeps what training
    needs in half the bytes of `bfloat16`, `residual` sends what has changed of a sample's hidden
    states since the epoch before, in 2 bits a number, and gradients in 2; `auto` leaves it to the
    planner, which takes as many bytes as the device's link carries in time."""
    residual: Residual | None = None
    """How the device computes with what the others have learned; None: as the run's `residual`."""
    residual_rank: int | None = None
    """Most ranks of a residual that stands beside its weight, as beside quantised ones; what a step
    leaves out the device still holds and tells in its log. None, or 0: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What is measured before the first round and after each."""

    data: DataConfig = field(default_factory=DataConfig)
    """A file on the coordinator; without `path` nothing is evaluated here."""
    batch_size: int = 16
    """Sequences that are evaluated together."""
    every_rounds: int = 1
    """Rounds between two evaluations; the last round is always evaluated."""
    on_devices: bool = True
    """Whether devices go through their private validation data, where they have some."""
    rank_energy: bool = False
    """Whether rows of metrics say how the energy of dW (its squared Frobenius norm) is spread over
    singular values after each round: `rank_energy`, the shares within the 1, 2, 4, ... largest."""
    prompts: str | tuple[str, ...] = ()
    """Prompts of which each evaluation shows what the model says to them: a list, or a file of
    lines or of rows with `prompt`. Shown on the console, kept in `samples.jsonl`. The coordinator
    then holds the whole model, as with a file."""
    prompt_form: Literal["auto", "text", "completion", "chat"] = "auto"
    """What a prompt is: `text` that is continued, the prompt before a `completion`, behind which
    `data.separator` stands, or a user's turn in a `chat`, by the chat template; `auto`: what rows
    of `data` are, text without a file."""
    max_new_tokens: int = 48
    """Most tokens that the model adds to a prompt."""
    scores: tuple[Score, ...] = ()
    """What is counted on `data` and `test_file` beside loss and accuracy. Of texts that the model
    writes after the prompts there, against all completions of each as references: bleu, nist,
    meteor, rouge_l, cider. Of classes: f1, f1_macro, mcc. See docs/scores.md."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How these texts are written."""
    test_file: str | tuple[str, ...] | None = None
    """A file on the coordinator, as in `data.path` and read as `data` says, on which the model that
    is the run's result is evaluated once, at the end; nothing is decided by it. A run that goes on
    after its end, or after a stop, has another end and another result."""

    def __post_init__(self) -> None:
        if isinstance(self.test_file, list):
            object.__setattr__(self, "test_file", tuple(self.test_file))
        if isinstance(self.prompts, list):
            object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "scores", tuple(self.scores))
        if not isinstance(self.prompts, str) and not all(self.prompts):
            raise ValueError("prompts must not hold an empty one")
        for name in ("batch_size", "every_rounds", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything about one run."""

    model: str
    """Folder of a transformers model, or a Hugging Face id."""
    preset: Preset | None = None
    """The published method that this run is: fills in what the method says and refuses what
    contradicts it; see docs/presets.md."""
    revision: str | None = None
    """Revision of a Hugging Face id."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What is trained."""
    label_names: tuple[str, ...] = ()
    """Classes of a classifier, in the order of their numbers."""
    labels: Literal["server", "device"] = "device"
    """Who sees the labels. In causal-LM training they are the text itself: `server` hands the
    private text to the coordinator; `device` keeps final norm and head on the device. A model whose
    later blocks need the token ids can be cut only with `server`: they then travel too."""
    listen: str = "tcp://*:7070"
    """Address that devices dial, as ZeroMQ writes it; `*` is every interface, port `*` any."""
    secret_key: Path = Path("coordinator.key")
    """The coordinator's secret key, made by `coordinator keygen`."""
    allow_list: Path = Path("devices.yaml")
    """Registered devices: a file of JSON, kept by `coordinator enrol` and `coordinator client`."""
    runs: Path = Path("runs")
    """Folder in which each run gets a folder of its own."""
    name: str | None = None
    """Name of the run's folder, which lies in `runs`: a name and no path; without one it is made
    from the date and time."""
    page: str | None = None
    """HOST:PORT of a page to watch the run on in a browser, as 127.0.0.1:7071; see docs/page.md.
    Needs the extra `page`. None: there is none."""
    page_token: Path | None = None
    """File with the token that a browser must show, made where there is none; needed where others
    than this machine can reach `page`."""
    rounds: int = 10
    """Aggregations in the run."""
    steps_per_round: int = 20
    """Optimizer steps between two aggregations."""
    waves: Literal["gathered", "available"] = "available"
    """What the coordinator computes together. `available`: whatever is there when it is free, so
    that nobody waits for others inside a step; equal runs differ by the order of additions.
    `gathered`: the j-th micro-batch of every device, so that equal runs give equal numbers to the
    last bit, at the pace of whoever is late each time."""
    wave_tokens: int | None = None
    """Most tokens, padding included, that `waves: available` computes together; a single
    micro-batch may have more. None: 4096 with `labels: server`, 256 with `labels: device`, where
    micro-batches that are computed together wait for one another."""
    round_mode: Literal["synchronous", "buffered"] = "synchronous"
    """`synchronous`: a round ends for all devices at once; `buffered`: each trains at its own pace,
    and what it has learned is merged when it comes; see docs/aggregation.md."""
    buffered: BufferedConfig = field(default_factory=BufferedConfig)
    """When that is, with `round_mode: buffered`; `rounds` then counts merges."""
    aggregation: Aggregation = "fedex"
    """How what the devices learned is joined; see docs/aggregation.md."""
    server_learning_rate: float = 1.0
    """How much of the way that adapters have gone in a round counts, of weights that more than one
    trains: below 1 all go on from a point between where they began and their mean."""
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)
    """Which uploads are joined at all, and how much those of a few can do."""
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    """How factors and changes travel between rounds."""
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    """Who chooses split points and ranks."""
    trained_by: Literal["devices", "coordinator"] = "devices"
    """`devices`: split learning on data that stays where it is; `coordinator`: the whole model on
    the data of `pooled`, without any device, as a centralised baseline."""
    pooled: PooledConfig = field(default_factory=PooledConfig)
    """What a coordinator without devices trains on, and what it trains."""
    residual: Residual = "auto"
    """How frozen residuals are computed with, here and on devices that `devices` does not tell
    otherwise: `folded` adds them to the frozen weights once a round, so that no step pays for them;
    `low-rank` keeps them beside the weights; `auto` folds unless a device lacks the memory for
    weights of its own instead of a file's. Quantised weights take nothing in. See
    docs/aggregation.md."""
    max_rank: int | None = None
    """Most ranks of a weight that are kept: with `aggregation: fedex` of all that was learned, else
    of what a round has changed. None: as many as the adapters of a round have together, with the
    other rules all."""
    min_devices: int = 1
    """Devices that a round needs; the run waits for them."""
    devices_per_round: int | None = None
    """Devices that are drawn for each round from those that are ready, by `training.seed`, likelier
    the more often a device was there and finished its rounds; the others wait. Where fewer than
    `min_devices` are drawn, so many are enough to go on. None: all; see docs/method.md."""
    patience_s: float = 120.0
    """Seconds that a device which is silent, or makes no progress, may hold up a round before it
    goes on without it; more for a device whose own steps, or those of the others, take long."""
    round_deadline_s: float | None = None
    """Seconds after which a round goes on without members that hold it up, if `min_devices` are
    left; what they send later is dropped, and they are in the next round. None waits for all."""
    default: DeviceSettings = field(
        default_factory=lambda: DeviceSettings(split=1, batch_size=8, codec="bfloat16")
    )
    """Settings of every device that `devices` does not name."""
    devices: dict[str, DeviceSettings] = field(default_factory=dict)
    """Settings by device name, as registered."""
    held_bytes: int = 256 * 2**20
    """Most bytes of hidden states that coordinator and device each hold of a device's samples, for
    the codec `residual`; samples beyond that are sent whole in each epoch. While a round goes on,
    what it has changed takes as much again."""
    keep_held: bool = True
    """Whether they are also written to the run's folder, at the start of each round, so that a
    coordinator that resumes the run need not be sent whole ones again."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Whether hidden states of frozen blocks are sent once, and kept."""
    server_rank: int | None = None
    """Rank of the coordinator's own adapters; None: lora.r."""
    max_length: int | None = None
    """Longest sequence in tokens; None: what the model can take."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Which weights are adapted."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Optimizer and schedule of both sides."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """Whether the run ends when that gets no better, and its best model counts."""
    report_to: tuple[Tracker, ...] = ()
    """Where numbers go beside the run's folder; see docs/monitoring.md. What fails or hangs there
    costs the run nothing."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """How they come there."""
    report: bool = True
    """Whether a run that ends with a result leaves `report.html` in its folder."""
    device: str = "auto"
    """Where the coordinator computes: `auto`, `cpu`, `cuda`, `cuda:1`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """In which processes it does: this one, or actors on a Ray cluster."""
    compute: Compute = "auto"
    """Dtype of the coordinator's matrix products; auto is bfloat16 where the hardware has it. Where
    numbers do not fit into float16, products go on in bfloat16, and the log names the block."""
    base: Base = "float32"
    """How the coordinator keeps the frozen weights of its part: `bfloat16` and `float16` need as
    much less, and `compute: bfloat16` or `float16`; `int8` and `int4` keep the linear layers of its
    blocks in 8 or 4 bits, as a device's `base` does; see docs/quantized.md."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    save_every_s: float | None = 60.0
    """Seconds after which a round is saved on its way, at the end of a step, by the coordinator and
    all of its devices: whoever dies costs no more than what was done since. Saving takes at most 2
    % of the time, however seldom that is. 0: after every step, whatever it costs; None: a round is
    saved on its way only for a device that leaves on purpose, and for a stop."""

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        for name in ("rounds", "steps_per_round", "min_devices", "save_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_listened("listen", self.listen)
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"report_to must name each once, got {list(self.report_to)}")
        self._check_ports()
        for name in ("wave_tokens", "max_rank", "devices_per_round"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise ValueError(f"{name} must be at least 1, got {most}")
        if self.patience_s <= 0:
            raise ValueError(f"patience_s must be above 0, got {self.patience_s}")
        if self.save_every_s is not None and self.save_every_s < 0:
            raise ValueError(f"save_every_s must be 0 or more, got {self.save_every_s}")
        if self.round_deadline_s is not None and self.round_deadline_s <= 0:
            raise ValueError(f"round_deadline_s must be above 0, got {self.round_deadline_s}")
        is_classifier = self.task == "sequence-classification"
        if is_classifier and len(self.label_names) < 2:
            raise ValueError("label_names must name at least 2 classes for this task")
        self._check_scores()
        self._check_aggregation()
        if self.round_mode == "buffered":
            self._check_buffered()
        if self.base != "float32" and self.trains_all:
            raise ValueError(
                f"base must be 'float32' where pooled.trains is 'all', got {self.base!r}: all "
                "weights are trained, and none is frozen"
            )
        self._check_engine()
        is_measured = self.evaluation.data.path is not None or self.evaluation.on_devices
        if self.early_stopping.is_on and not is_measured:
            raise ValueError(
                "early_stopping.patience_rounds: nothing is measured; name a file in "
                "evaluation.data.path, or let devices evaluate (evaluation.on_devices)"
            )

    def _check_aggregation(self) -> None:
        """Refuse what the rule does not allow."""
        if not 0 < (rate := self.server_learning_rate) < float("inf"):
            raise ValueError(f"server_learning_rate must be above 0 and finite, got {rate}")
        if self.aggregation not in RULES:
            names = ", ".join(RULES)
            raise ValueError(f"aggregation must be one of {names}, got {self.aggregation!r}")
        rule = RULES[self.aggregation]
        if not self.exchange.is_plain and (rule.restarts or not rule.has_residual):
            raise ValueError(
                "exchange with another codec than float32 or downlink: budget needs "
                f"aggregation: fedex or exact, got {self.aggregation}"
            )
        if self.screening.method == "trimmed-mean" and self.aggregation == "exact":
            raise ValueError(
                "screening.method: 'trimmed-mean' needs an aggregation after which all hold the "
                "same factors: fedex, stack, svd, svd-balanced, zeropad or fedavg"
            )

    def _check_scores(self) -> None:
        """Refuse scores that the run cannot have."""
        evaluation = self.evaluation
        try:
            check_scores(evaluation.scores, num_classes=len(self.label_names))
        except ValueError as error:
            raise ValueError(f"evaluation.{error}") from error
        if evaluation.scores and evaluation.data.path is None and evaluation.test_file is None:
            raise ValueError(
                "evaluation.scores: nothing is scored; name a file in evaluation.data.path or "
                "evaluation.test_file"
            )

    def _check_engine(self) -> None:
        """Refuse what actors in a row do not do."""
        if self.engine.kind == "local":
            return
        if self.trained_by != "devices":
            raise ValueError("engine: 'ray' serves devices, and trained_by has none")
        asks_whole = self.evaluation.prompts or self.evaluation.scores
        if self.engine.stages > 1 and asks_whole:
            raise ValueError(
                "evaluation.prompts and scores ask a whole model, which no stage has with "
                f"engine.stages: {self.engine.stages}"
            )

    def _check_buffered(self) -> None:
        """Refuse what needs everybody at the same moment."""
        if self.trained_by != "devices":
            raise ValueError("round_mode: 'buffered' is about devices, and trained_by has none")
        rule, planning = self.aggregation, self.planning
        if not RULES[rule].is_additive:
            raise ValueError(
                f"round_mode: 'buffered' needs aggregation: exact: {rule!r} joins what everybody "
                "holds at one moment"
            )
        if RESIDUAL in (self.settings(name).codec for name in ("", *self.devices)):
            raise ValueError(
                "codec: 'residual' counts rounds that all devices begin together, which "
                "round_mode: 'buffered' has not; use int8"
            )
        if self.replay.when != "never":
            raise ValueError(
                f"replay.when: {self.replay.when!r} counts the steps of rounds, which round_mode: "
                "'buffered' has not; set it to never"
            )
        if not self.exchange.is_plain:
            raise ValueError(
                "exchange: with round_mode: 'buffered' factors and changes travel whole; use "
                "downlink: full and codec: float32"
            )
        if self.devices_per_round is not None:
            raise ValueError(
                "devices_per_round: with round_mode: 'buffered' no round begins for which devices "
                "could be drawn; buffered.size says after how many updates to merge"
            )
        if self.round_deadline_s is not None:
            raise ValueError("round_deadline_s: with round_mode: 'buffered' no round has an end")
        if planning.ranks == "rngwp":
            raise ValueError(
                "planning.ranks: 'rngwp' moves ranks between rounds, which round_mode: 'buffered' "
                "has not; use uniform or fixed"
            )
        if planning.replan and not planning.split == planning.ranks == "fixed":
            raise ValueError(
                "planning.replan: plans change between rounds, which round_mode: 'buffered' has "
                "not; set it to false"
            )

    def _check_ports(self) -> None:
        """Refuse addresses of this run that have one port."""
        taken = {"listen": self.listen.rpartition(":")[2]}
        if self.page is not None:
            has_token = self.page_token is not None
            taken["page"] = str(web_address("page", self.page, has_token=has_token).port)
        if "prometheus" in self.report_to:
            taken["tracking.prometheus_address"] = str(self.tracking.prometheus_place[1])
        ports = [port for port in taken.values() if port not in ("*", "0")]
        if twice := next((port for port in ports if ports.count(port) > 1), None):
            keys = " and ".join(key for key, port in taken.items() if port == twice)
            raise ValueError(f"{keys} have one port, {twice}; give each its own")

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, and none is frozen."""
        return self.trained_by == "coordinator" and self.pooled.trains == "all"

    @property
    def holds_all(self) -> bool:
        """Whether the coordinator holds the whole model, so that it can evaluate by itself."""
        return self.evaluation.data.path is not None or bool(self.evaluation.prompts)

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers of the coordinator's blocks are kept in 8 or 4 bits."""
        return self.base in ("int8", "int4")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.rounds * self.steps_per_round

    def drawn_share(self, num_devices: int) -> float:
        """Return the share of so many devices that a round draws."""
        return min(1.0, (self.devices_per_round or num_devices) / num_devices)

    @property
    def most_wave_tokens(self) -> int | None:
        """Most tokens of a wave of what is there; None where waves are gathered."""
        return None if self.waves == "gathered" else self.wave_tokens or WAVE_TOKENS[self.labels]

    @property
    def open_micros(self) -> int:
        """Micro-batches of each device that the coordinator holds for their backward pass."""
        return MOST_AWAY if self.waves == "available" and self.labels == "device" else 1

    def unwatched(self) -> Self:
        """Return the same run without its page, which changes nothing of it."""
        return replace(self, page=None, page_token=None)

    def evaluates_after(self, rounds_done: int) -> bool:
        """Return whether the model is evaluated after so many rounds, as it is before the first."""
        is_end = rounds_done in (0, self.rounds)
        return is_end or rounds_done % self.evaluation.every_rounds == 0

    def settings(self, device: str) -> DeviceSettings:
        """Return what *device* runs: its own fields over those of `default`."""
        own = self.devices.get(device, DeviceSettings())
        first = DeviceSettings(
            split=1,
            batch_size=8,
            codec="bfloat16",
            r=self.lora.r,
            in_flight=2,
            residual=self.residual,
        )
        merged = {
            name: next(
                (v for s in (own, self.default, first) if (v := getattr(s, name)) is not None),
                None,
            )
            for name in DeviceSettings.__dataclass_fields__
        }
        return DeviceSettings(**merged)
