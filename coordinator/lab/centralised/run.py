"""A run without devices, from its folder to its result, for the command and for programs.

Its folder holds what that of any run does: config, events, metrics, telemetry, checkpoints, result.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.export.adapter import export_adapter
from coordinator.export.asked.scoring import scoring_of
from coordinator.export.asked.texts import Sayings
from coordinator.export.merged import export_merged
from coordinator.export.options import ExportOptions
from coordinator.export.outcome import tell_choice, tested
from coordinator.export.run import PEFT, Say, Trained, write_export
from coordinator.export.run_facts import best_checkpoint, best_of, result_checkpoint, run_facts
from coordinator.lab.centralised.trainer import (
    POOLED,
    Dataset,
    MicroShape,
    PooledTrainer,
    make_runtime,
    plan_pooled,
)
from coordinator.report.at_end import report_at_end
from coordinator.results.events.event import Watcher
from coordinator.results.events.run import (
    AlreadyComplete,
    Exported,
    FolderKnown,
    RunFinished,
    RunPaused,
    RunStarted,
    StopAsked,
    WeightsAdapted,
)
from coordinator.results.events.steering import EndedEarly, RunStopped, SampleText
from coordinator.results.lifecycle import (
    ADAPTER,
    COMPLETED,
    METRICS,
    PAUSED,
    STOPPED,
    TELEMETRY,
    new_folder,
    reopen,
    reopened,
    restoring,
    take_up,
)
from coordinator.results.metrics import Reporting
from coordinator.results.result_files import is_whole
from coordinator.results.run_folder import SAMPLES, Checkpoint, RunFolder
from coordinator.results.standing.observed import ModelKnown
from coordinator.results.watchers import RunFiles, Watchers
from coordinator.steering.early_stopping import EarlyStopping
from coordinator.steering.listener import Listener
from coordinator.steering.wishes import URGENT, Wish
from coordinator.tracking.reporting import reporting
from coordinator.tracking.trackers import require_trackers
from edge_sdk.command import stopping_on_signals
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import EvalReport, Stamp
from edge_sdk.runtime.torch_runtime import TorchRuntime

log = logging.getLogger(__name__)

MODEL = "model"
"""Folder of the result where all weights were trained; adapters are where every run has them."""


@dataclass(frozen=True)
class PooledResult:
    """Result of a run on pooled data."""

    folder: Path
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl: row 0 is from before training, row n from after n rounds."""
    shapes: list[tuple[MicroShape, ...]]
    """Micro-batches of every step, for a clock that models their cost."""


def train_pooled(
    config: ServeConfig,
    dataset: Dataset | None = None,
    watcher: Watcher | None = None,
    *,
    durable: bool = True,
) -> PooledResult:
    """Train on pooled data and return what each evaluation found; for programs.

    Args:
        config: The run; its rounds, steps, seed, optimizer and evaluation as with devices.
        dataset: Everybody's data in memory, as rows or tokenised; None: what `config.pooled` names.
        watcher: Who looks on; None: nobody.
        durable: Whether checkpoints and the result are written, in addition to metrics and config.

    Raises:
        ConfigError: the config asks for what cannot be had, or the run's folder exists.
        DataError: something is wrong with the data.
        NumericError: a gradient was NaN or infinite.
    """
    with _new_run(config, dataset, watcher or Watchers(), durable=durable) as run:
        run.train()
        return run.result()


def serve_pooled(config: ServeConfig, watcher: Watcher) -> str:
    """Start a run without devices and train it to its end; return how it ended."""
    with _new_run(config, None, watcher) as run:
        return _steered(run)


def resume_pooled(path: Path, watcher: Watcher, overrides: list[str]) -> str:
    """Go on with the run at *path* as if nothing had happened; return how it ended.

    One that was killed before its first checkpoint begins anew.
    """
    with reopened(path, overrides) as (folder, config, checkpoint):
        done = -1 if checkpoint is None else checkpoint.state.get("step", -1)
        if done >= config.total_steps or has_ended_early(folder, config, done):
            watcher.see(AlreadyComplete(path))
            if is_whole(folder, result_name(config)):
                return COMPLETED
        require_trackers(config)
        trainer = PooledTrainer(config, ServerModel(config))
        with (
            reporting(config, folder, watcher) as told,
            report_at_end(config, folder, told) as seen_by,
        ):
            run = PooledRun(config, trainer, folder, seen_by)
            if checkpoint is not None:
                with restoring(folder):
                    run.restore(checkpoint)
            return _steered(run)


def _steered(run: PooledRun) -> str:
    """Train to the end, or until somebody wants it to be left; return how it ended."""
    with Listener(run.folder.path, run.ask) as listener:
        with stopping_on_signals(run.stop):
            outcome = run.train()
        listener.answer(outcome)
    return outcome


def has_ended_early(folder: RunFolder, config: ServeConfig, step: int) -> bool:
    """Return whether a run ends at *step* because nothing better is to be expected."""
    if step <= 0 or step % config.steps_per_round or not config.early_stopping.is_on:
        return False
    return EarlyStopping(folder, config.early_stopping).verdict().stops


def result_name(config: ServeConfig) -> str:
    """Return the name of the folder that holds the run's result."""
    return MODEL if config.pooled.trains == "all" else ADAPTER


def export_pooled(
    run: RunFolder, folder: Path, *, options: ExportOptions = PEFT, say: Say = log.info
) -> float:
    """Export the newest checkpoint of *run*; return what `export_run` does."""
    _, config, _ = reopen(run.path, [])
    trained = read_pooled(run, config)
    if not trained.learned and options == PEFT:
        options = ExportOptions(format="merged")
    return write_export(trained, config, folder, options, say)


def read_pooled(
    run: RunFolder, config: ServeConfig, checkpoint: Checkpoint | None = None
) -> Trained:
    """Return what a run without devices has learned by a checkpoint; None: that of its result."""
    checkpoint = checkpoint or result_checkpoint(run, config)
    # Its data may be gone by now, and is not needed.
    model = ServerModel(replace(config, evaluation=EvaluationConfig()))
    runtime = make_runtime(config, model, plan_pooled(config, model.facts))
    load_trained(runtime, checkpoint)
    adapters = runtime.state.adapters.products()
    done = checkpoint.state["step"] // config.steps_per_round
    return Trained(model.source, adapters, runtime.state.head(), run_facts(run, done))


def load_trained(runtime: TorchRuntime, checkpoint: Checkpoint) -> None:
    """Take over what *checkpoint* holds.

    Raises:
        KeyError: it holds something else: adapters of other weights, or all weights.
        RuntimeError: its adapters have other ranks.
    """
    state = checkpoint.arrays["trainer"]
    names = {name for name in runtime.state.checkpoint() if not name.startswith("optimizer:")}
    if lost := names ^ {name for name in state if not name.startswith("optimizer:")}:
        raise KeyError(min(lost))
    runtime.state.restore(state)


def write_result(
    run: RunFolder, config: ServeConfig, trainer: PooledTrainer, done: int | None = None
) -> float:
    """Write the result into the run's folder; return the largest difference of a logit, read back.

    The trainer's model must not be used after this: checking may write into its weights.
    """
    state, source = trainer.runtime.state, trainer.model.source
    learned, head, facts = state.adapters.products(), state.head(), run_facts(run, done)
    folder = run.path / result_name(config)
    if config.pooled.trains == "all":
        return export_merged(source, learned, head, folder, facts, dtype="float32")
    return export_adapter(source, learned, head, folder, facts)


@contextmanager
def _new_run(
    config: ServeConfig, dataset: Dataset | None, watcher: Watcher, *, durable: bool = True
) -> Iterator[PooledRun]:
    if config.trained_by != "coordinator":  # a run that is resumed must be the one that was begun
        raise ConfigError("trained_by: must be 'coordinator' to train on pooled data")
    require_trackers(config)
    trainer = PooledTrainer(config, ServerModel(config), dataset)
    with (
        new_folder(config) as folder,
        reporting(config, folder, watcher) as told,
        report_at_end(config, folder, told) as seen_by,
    ):
        yield PooledRun(config, trainer, folder, seen_by, durable=durable)


class PooledRun:
    """One run on pooled data: rounds of steps, a row of metrics and a checkpoint after each."""

    def __init__(
        self,
        config: ServeConfig,
        trainer: PooledTrainer,
        folder: RunFolder,
        watcher: Watcher,
        *,
        durable: bool = True,
    ) -> None:
        self.config, self.trainer, self.folder = config, trainer, folder
        self._watcher, self._durable = Watchers([RunFiles(folder), watcher]), durable
        self._id = f"{folder.name}-{secrets.token_hex(4)}"
        self._reporting = Reporting(self._watcher, bool(config.label_names))
        model = trainer.model
        self._sayings = Sayings(config, model.source, model.tokenizer)
        self._scoring = scoring_of(
            config, model.source, model.tokenizer, model.eval_batches, model.test_batches
        )
        self._step = 0
        self._wish: Wish | None = None
        self._told: Wish | None = None

    def stop(self) -> None:
        """Leave at the end of the step, with a checkpoint; any thread may call this."""
        self.ask(URGENT)

    def ask(self, wish: Wish) -> None:
        """Leave as is wished, with a checkpoint; any thread may call this."""
        self._wish = wish

    def _leaves(self) -> bool:
        """Return whether the run is to be left here."""
        wish = self._wish
        if wish is None:
            return False
        if wish is not self._told:
            self._told = wish
            self._watcher.see(StopAsked(wish.kind, wish.after_round, wish.is_urgent))
        return not (wish.after_round and self._step % self.config.steps_per_round)

    def train(self) -> str:
        """Train to the end, or until `stop` was called; return how it ended."""
        config = self.config
        self._watcher.see(FolderKnown(self.folder.path))
        if not self.folder.rows("metrics.jsonl"):
            self._end_round(0, {})
        if config.pooled.trains == "adapters":
            self._watcher.see(WeightsAdapted(self.trainer.model.coverage))
        self._watcher.see(ModelKnown(self.trainer.model.facts.layout.num_blocks))
        self._watcher.see(RunStarted(self._id, self._step))
        self._reporting.begin_round()
        while self._step < config.total_steps and not self._ends_early():
            if self._leaves():
                return self._leave()
            self._train_step()
            if self._step % config.steps_per_round == 0:
                self._close_round()
        self._watcher.see(RunFinished(COMPLETED))
        if self._durable:
            self._write_result()
        return COMPLETED

    def result(self) -> PooledResult:
        """Return the result so far."""
        shapes = [self.trainer.shapes(step) for step in range(self._step)]
        return PooledResult(self.folder.path, self.folder.rows("metrics.jsonl"), shapes)

    # ---- steps and rounds ----

    def _ends_early(self) -> bool:
        """Return whether the last round was the last one; say so where it has just ended."""
        config, early = self.config, self.config.early_stopping
        if not has_ended_early(self.folder, config, self._step):
            return False
        found, done = EarlyStopping(self.folder, early).verdict(), self._step
        round_ = done // config.steps_per_round - 1
        metric = early.metric_for_best_model
        self._watcher.see(EndedEarly(round_, found.rounds_without, metric, found.best_round))
        return True

    def _train_step(self) -> None:
        round_ = self._step // self.config.steps_per_round
        report = self.trainer.train(self._stamp(round_))
        self._step += 1
        end_step = (round_ + 1) * self.config.steps_per_round
        self._reporting.step(POOLED, report, end_step)

    def _stamp(self, round_: int) -> Stamp:
        return Stamp(run=self._id, device=POOLED, round=round_, step=self._step)

    def _close_round(self) -> None:
        config, done = self.config, self._step // self.config.steps_per_round
        plan = self.trainer.plan
        self._reporting.telemetry(done - 1)
        facts = {
            "samples": config.steps_per_round * plan.batch_size,
            "cut_error": 0.0,
            # Rank of what is added to a weight; unbounded where the weight itself is trained.
            "rank": max(plan.ranks.values()) if plan.ranks else None,
        }
        self._end_round(done, facts)
        self._reporting.begin_round()

    def _end_round(self, done: int, facts: dict[str, Any]) -> None:
        """Write the row of *done* rounds, then a checkpoint, so that no crash loses a row."""
        evaluation, trainer = self.config.evaluation, self.trainer
        is_due = self.config.evaluates_after(done)
        batches = trainer.model.eval_batches if is_due else []
        evaluated = trainer.evaluate(batches) if batches else None
        is_scored = is_due and self._scoring.is_due(done, self.config.rounds)
        scores = self._scoring.score(trainer) if is_scored else {}
        self._reporting.end_round(done, self._step, facts, evaluated, scores)
        if is_due and self._sayings:
            for prompt, text in self._sayings.say(trainer.continue_texts):
                self._watcher.see(SampleText(done, prompt, text))
        if trainer.held_out and is_due and evaluation.on_devices:
            own = trainer.evaluate(trainer.held_out)
            report = EvalReport(stamp=self._stamp(done), **own._asdict())
            self._reporting.evaluation(POOLED, report)
        self._reporting.flush()
        self._save()

    # ---- stopping and going on ----

    def _save(self) -> None:
        if not self._durable:
            return
        reporting = self._reporting
        reported = {"progress": reporting.progress(), "costs": reporting.costs()}
        state = {"run": self._id, "step": self._step, **reported}
        checkpoint = Checkpoint(state, {"trainer": self.trainer.runtime.state.checkpoint()})
        verdict, config = best_of(self.folder, self.config), self.config
        best = None if verdict is None else verdict.best_round
        spared = [] if best is None else [best * config.steps_per_round]
        self.folder.save_checkpoint(self._step, checkpoint, config.save_total_limit, spared)

    def _leave(self) -> str:
        self._save()
        if self._wish is None or self._wish.kind == "pause":
            self._watcher.see(RunFinished(PAUSED))
            self._watcher.see(RunPaused(self.folder.path))
            return PAUSED
        self._watcher.see(RunFinished(STOPPED))
        done = self._step // self.config.steps_per_round
        if self._durable:
            self._write_result()
        self._watcher.see(RunStopped(self.folder.path, done, self.config.rounds))
        return STOPPED

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to *checkpoint*; rows written after it are dropped."""
        self._id, self._step = checkpoint.state["run"], checkpoint.state["step"]
        self._reporting.load_progress(checkpoint.state["progress"])
        self._reporting.load_costs(checkpoint.state.get("costs", {}))  # older ones have none
        load_trained(self.trainer.runtime, checkpoint)
        done = self._step // self.config.steps_per_round
        self.folder.drop_rows_from(METRICS, done + 1)
        self.folder.drop_rows_from(TELEMETRY, done)
        self.folder.drop_rows_from(SAMPLES, done + 1)
        take_up(self.folder, checkpoint, self._watcher)

    def _write_result(self) -> None:
        config, folder, trainer = self.config, self.folder, self.trainer
        what, done = result_name(config), self._step // config.steps_per_round
        if (best := best_checkpoint(folder, config, done)) is not None:
            tell_choice(folder, config, done, self._watcher)
            load_trained(trainer.runtime, best)
            done = best.state["step"] // config.steps_per_round
        state = trainer.runtime.state
        learned, facts = state.adapters.products(), run_facts(folder, done)
        trained = Trained(trainer.model.source, learned, state.head(), facts)
        tested(folder, config, trained, trainer.model.test_batches, self._watcher)
        difference = write_result(folder, config, trainer, done)
        self._watcher.see(Exported(what, difference, self.folder.path / what))
