"""What a run consists of, in one place, and how it is saved and brought back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.aggregation.ledger import Ledger, Report
from coordinator.aggregation.round_start import RoundStartBuilder
from coordinator.aggregation.rules import SERVER
from coordinator.config.run import ServeConfig
from coordinator.engine.interface import Engine, Job
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Gateway
from coordinator.planning.problem import PlanningProblem, ServerProfile, planning_length
from coordinator.planning.run_planner import Planner
from coordinator.results.events import DeviceLeft
from coordinator.results.metrics import Reporting
from coordinator.results.run_folder import Checkpoint, RunFolder
from coordinator.results.watchers import RunFiles, Watcher, Watchers
from coordinator.rounds.admission import Admission
from coordinator.rounds.state import RunState
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Activation
from edge_sdk.runtime.training_state import under
from profiler.sensors.memory import memory_info


@dataclass
class PendingInputs:
    """What devices have sent and nobody has used yet, by device."""

    jobs: dict[str, Job] = field(default_factory=dict)
    """Input of the current wave."""
    grads: dict[str, Array] = field(default_factory=dict)
    """Gradients of its final hidden states."""
    early: dict[str, dict[tuple[int, int], Envelope]] = field(default_factory=dict)
    """Activations of later waves, by step and micro-batch."""
    reports: dict[str, Report] = field(default_factory=dict)
    """Uploads of the round."""
    evals: list[tuple[Activation, Job]] = field(default_factory=list)
    """Micro-batches to evaluate, in the order of their arrival."""

    def forget(self, device: str) -> None:
        """Drop everything from one device."""
        self.jobs.pop(device, None)
        self.grads.pop(device, None)
        self.early.pop(device, None)
        self.reports.pop(device, None)
        self.evals = [(message, job) for message, job in self.evals if job.device != device]


class Run:
    """One run: configuration, model, what was learned, where it stands."""

    def __init__(
        self,
        config: ServeConfig,
        model: ServerModel,
        folder: RunFolder,
        gateway: Gateway,
        watcher: Watcher,
        run_id: str,
        least_devices: int | None = None,
    ) -> None:
        self.id = run_id
        self.config, self.model, self.folder = config, model, folder
        self.gateway, self.watcher = gateway, Watchers([RunFiles(folder), watcher])
        self.state = RunState(
            total_rounds=config.rounds,
            steps_per_round=config.steps_per_round,
            min_devices=config.min_devices,
            labels_on_device=config.labels == "device",
            least_devices=least_devices,
        )
        self.planner = Planner(config, model.facts, problem(config, model))
        self.engine: Engine = model.planned_engine()
        self.ledger = Ledger(
            model.facts, config.lora, config.aggregation, config.max_rank, config.training.seed
        )
        self.engine.begin(self.ledger.enrol(SERVER, self.engine.ranks))
        self.admission = Admission(config, model, gateway, self.planner, run_id)
        self.round_start = RoundStartBuilder(self.ledger, model.facts)
        self.reporting = Reporting(self.watcher, bool(config.label_names), gateway)
        self.inputs = PendingInputs()
        self.must_rewind = False
        """The round was given up: everything must be as at the last checkpoint."""

    def save(self) -> None:
        """Write a checkpoint of this very moment; steps are whole."""
        state = {
            "run": self.id,
            "round": self.state.round,
            "step": self.state.step,
            "attempt": self.state.attempt,
            "devices": sorted(set(self.state.members) | self.round_start.current),
            "begins": self.state.begins,
            "unevaluated": sorted(self.state.awaiting_eval),
            "row": self.reporting.pending,
            "progress": self.reporting.progress(),
            "planner": self.planner.state(),
        }
        arrays = {"engine": self.engine.state(), "ledger": self.ledger.state()}
        self.folder.save_checkpoint(
            self.state.step, Checkpoint(state, arrays), self.config.save_total_limit
        )
        self.state.safe_step = self.state.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be as at *checkpoint*."""
        state = checkpoint.state
        attempt = max(state["attempt"], self.state.attempt)
        self.state.restore(state["round"], state["step"], attempt)
        self.ledger.load_state(checkpoint.arrays["ledger"])
        self.planner.load_state(state["planner"])
        self._restore_engine(checkpoint.arrays["engine"])
        self.round_start.forget()
        self.reporting.load_progress(state["progress"])
        self.state.begins = dict(state["begins"])
        self.inputs = PendingInputs()
        self.must_rewind = False

    def _restore_engine(self, state: dict[str, Array]) -> None:
        """Make the engine as it was saved, whatever has been planned since."""
        own = {n: v for n, v in under("own:", state).items() if n.endswith(".A")}
        ranks = {name.removesuffix(".A"): value.shape[0] for name, value in own.items()}
        first = int(state["first"])
        if (first, ranks) != (self.engine.first, self.engine.ranks):
            self.engine = self.model.make_engine(first, ranks)
        self.engine.load_state(state)

    @property
    def is_engine_outdated(self) -> bool:
        """Whether our own blocks or ranks are not what the plans in force leave to us."""
        first, ranks = self.planner.first, self.planner.server_ranks
        if first is None or ranks is None:
            return False
        wanted = {name: rank for name, rank in ranks.items() if rank}
        return (first, wanted) != (self.engine.first, self.engine.ranks)

    def renew_engine(self) -> None:
        """Hold what the plans in force leave to us; dW stays, moments where they still fit."""
        first, ranks = self.planner.first, self.planner.server_ranks
        assert first is not None
        assert ranks is not None
        carried = self.engine.carried()
        del self.engine  # two would need twice the memory
        self.engine = self.model.make_engine(first, ranks)
        pairs = self.ledger.enrol(SERVER, ranks)
        residuals = self.ledger.residuals(SERVER, self.model.facts.targets)
        self.engine.begin(pairs, residuals, carried)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from *checkpoint* in a new process: rows written after it are dropped."""
        self.restore(checkpoint)
        row = self.reporting.pending = checkpoint.state["row"]
        self.state.awaited = set(checkpoint.state["devices"])
        evaluated = set((row or {}).get("eval_by_device", {}))
        self.state.awaiting_eval = set(checkpoint.state["unevaluated"]) - evaluated
        done = self.state.round
        first_open = done if self.reporting.pending else done + 1
        self.folder.drop_rows_from("metrics.jsonl", first_open)
        self.folder.drop_rows_from("telemetry.jsonl", done)

    def lose(self, device: str, reason: str) -> None:
        """Forget a device that is gone or, without a *reason*, begins anew."""
        was_ready = device in self.state.ready
        self.must_rewind |= self.state.leave(device)
        self.round_start.forget(device)
        self.inputs.forget(device)
        if was_ready and reason:
            self.watcher.see(DeviceLeft(device, reason))


def problem(config: ServeConfig, model: ServerModel) -> PlanningProblem | None:
    """Return what is to be planned without any device; None where the config plans nothing."""
    planning = config.planning
    if planning.split == planning.ranks == "fixed":
        return None
    memory = planning.server_memory_bytes or memory_info().available.value
    found = PlanningProblem(
        config=config,
        facts=model.facts,
        model=model.shape,
        profiles={},
        server=ServerProfile(memory_bytes=memory),
        length=planning_length(config, model.max_length),
    )
    if found.split_rule.weighs_time and found.server_speed is None:
        speed = model.measured_speed()
        return replace(found, server=replace(found.server, flops_per_s=speed))
    return found
