"""Which model is the result of a run, and how well it does on what nothing was decided by."""

from __future__ import annotations

from typing import Any

from coordinator.aggregation.ledger import Ledger
from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.export.adapter import export_adapter
from coordinator.export.asked.scoring import Written, make_scoring
from coordinator.export.run import Trained, read_trained
from coordinator.export.run_facts import best_checkpoint, best_of, run_facts
from coordinator.export.trained import TrainedModel
from coordinator.results.events.event import Watcher
from coordinator.results.events.steering import BestChosen, TestEvaluated
from coordinator.results.json_text import json_text
from coordinator.results.lifecycle import ADAPTER
from coordinator.results.metrics import score_of
from coordinator.results.run_folder import TEST_RESULTS, RunFolder
from edge_sdk.data.batches import MicroBatch
from edge_sdk.model.weights import load_tokenizer


def choose(run: RunFolder, config: ServeConfig, newest: Trained, watcher: Watcher) -> Trained:
    """Return the model that is the result of a run with devices, and say which it is.

    Args:
        run: The run.
        config: Its config.
        newest: What it has learned by its end.
        watcher: Is told where that is not the result.
    """
    done = newest.facts.rounds
    found = best_checkpoint(run, config, done)
    if found is None:
        return newest
    tell_choice(run, config, done, watcher)
    return read_trained(run, config, found)


def tell_choice(run: RunFolder, config: ServeConfig, done: int, watcher: Watcher) -> None:
    """Say that the best model is the result, and not the last one."""
    verdict = best_of(run, config)
    assert verdict is not None
    assert verdict.best_round is not None
    metric = config.early_stopping.metric_for_best_model
    watcher.see(BestChosen(verdict.best_round, done, metric, verdict.best))


def tested(
    run: RunFolder,
    config: ServeConfig,
    trained: Trained,
    batches: list[MicroBatch],
    watcher: Watcher,
) -> Trained:
    """Evaluate the result on the test file, if there is one; the facts then know of it.

    Args:
        run: The run, in whose folder it is written.
        config: Its config.
        trained: The result.
        batches: The file as tokens; empty without one.
        watcher: Is told what was found.
    """
    if not batches:
        return trained
    score, _ = measured(config, trained, batches, config.evaluation.test_file)
    round_ = trained.facts.result_round
    found: dict[str, Any] = {"round": round_}
    found |= {f"test_{name}": value for name, value in score.items()}
    run.write_text(TEST_RESULTS, json_text(found) + "\n")
    watcher.see(TestEvaluated(round_, score))
    return trained._replace(facts=run_facts(run, round_))


def measured(
    config: ServeConfig,
    trained: Trained,
    batches: list[MicroBatch],
    file: str | tuple[str, ...] | None,
) -> tuple[dict[str, float], list[Written]]:
    """Return loss, accuracy and scores of a trained model on a file, and what it wrote for them.

    Args:
        config: The run.
        trained: What it has learned.
        batches: The file as tokens.
        file: The file; None: `evaluation.data.path`.
    """
    source = trained.source
    model = TrainedModel(config, source, trained.learned, trained.head)
    score = score_of(model.evaluate(batches), is_classifier=bool(config.label_names))
    scoring = make_scoring(config, source, load_tokenizer(source.folder), batches, file)
    return {**score, **scoring.score(model)}, scoring.written


def write_result(
    run: RunFolder, config: ServeConfig, model: ServerModel, ledger: Ledger, watcher: Watcher
) -> float | None:
    """Write the adapter that is the result of a run with devices, tested where there is a file.

    Args:
        run: The run, in whose folder it is written.
        config: Its config.
        model: Its base.
        ledger: What it has learned by its end.
        watcher: Is told what was found.

    Returns:
        The largest difference of a logit, read back; None where no round is done.
    """
    facts, learned = run_facts(run), ledger.global_factors()
    if not learned:
        return None
    chosen = choose(run, config, Trained(model.source, learned, ledger.head, facts), watcher)
    chosen = tested(run, config, chosen, model.test_batches, watcher)
    target = run.path / ADAPTER
    return export_adapter(model.source, chosen.learned, chosen.head, target, chosen.facts)


def test_batches(config: ServeConfig) -> list[MicroBatch]:
    """Return the test file as tokens, of a run whose model is not loaded; empty without one."""
    return [] if config.evaluation.test_file is None else ServerModel(config).test_batches
