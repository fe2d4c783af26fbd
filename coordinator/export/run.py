"""Hand the result of a run out: a standard PEFT adapter, or the whole model with it merged in."""

from __future__ import annotations

import logging
from pathlib import Path

from coordinator.aggregation.ledger import Ledger
from coordinator.config.run import ServeConfig
from coordinator.export.adapter import export_adapter
from coordinator.export.merged import export_merged
from coordinator.results.run_folder import CONFIG, RunFolder
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import ModelFacts, find_targets
from edge_sdk.model.weights import ModelSource

log = logging.getLogger(__name__)


def export_run(run: RunFolder, folder: Path, *, merged: bool) -> float:
    """Export the newest checkpoint of *run*; return the largest difference of a logit.

    Raises:
        ConfigError: the run has not finished a round yet.
    """
    config = load_config(ServeConfig, run.path / CONFIG, env={})
    source = ModelSource(
        config.model, config.task, num_labels=len(config.label_names), revision=config.revision
    )
    source.load_whole(config.training.seed)
    targets = find_targets(source.config, config.task, source.layout, config.lora)
    facts = ModelFacts(source.layout, targets)
    ledger = Ledger(facts, config.lora, config.aggregation, None, config.training.seed)
    checkpoint = run.load_checkpoint()
    for damage in checkpoint.damaged:
        log.warning("checkpoint.damaged path=%s reason=%s", damage.checkpoint, damage.reason)
    ledger.load_state(checkpoint.arrays["ledger"])
    learned = ledger.global_factors()
    if not learned:
        raise ConfigError(f"{run.path} has not finished a round yet; there is nothing to export")
    write = export_merged if merged else export_adapter
    return write(source, learned, ledger.head, folder)
