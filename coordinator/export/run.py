"""Hand the result of a run out, in the format that is asked for."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from coordinator.aggregation.ledger import Ledger
from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.export.adapter import (
    VLLM_DEFAULT_RANK,
    export_adapter,
    export_uniform,
    least_ranks,
    vllm_rank,
)
from coordinator.export.check import TOLERANCE
from coordinator.export.facts import RunFacts
from coordinator.export.gguf_adapter import export_gguf
from coordinator.export.hub import push
from coordinator.export.merged import export_merged
from coordinator.export.needs import check_options, find_converter
from coordinator.export.options import ExportOptions
from coordinator.export.peft_names import is_stacked
from coordinator.export.run_facts import result_checkpoint, run_facts
from coordinator.export.trained import TrainedModel
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import Checkpoint, RunFolder
from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.files import private_files
from edge_sdk.lora.factors import Array, Factors, compress
from edge_sdk.lora.targets import ModelFacts, find_targets
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.interface import TailSums

log = logging.getLogger(__name__)

PEFT = ExportOptions()
# Weights that lost most by a cut, of which each is shown.
MOST_SHOWN = 5
Say = Callable[[str], None]


class Trained(NamedTuple):
    """What a run has learned about a model."""

    source: ModelSource
    learned: Mapping[str, Factors]
    """dW by weight; empty where nothing is adapted."""
    head: Mapping[str, Array]
    """Parameters that were trained in full."""
    facts: RunFacts
    """How it came about."""


def export_run(
    run: RunFolder | Path,
    folder: Path,
    *,
    merged: bool = False,
    options: ExportOptions = PEFT,
    say: Say = log.info,
) -> float:
    """Export the result of *run*, or what would be it; return the largest difference of a logit.

    Args:
        run: The run, or its folder.
        folder: What is written.
        merged: The same as the format `merged`.
        options: How it is written.
        say: Takes each line that a person should see.

    Raises:
        ConfigError: the run has not finished a round yet, or cannot be had in this format.
        ExportError: what was written, read back, is something else.
        StorageError: the folder cannot be written.
        TransportError: it was written, but not pushed.
    """
    if isinstance(run, Path):
        run = RunFolder.open(run)
    if merged:
        options = ExportOptions(format="merged")
    check_options(options)
    config = read_config(run.path)
    trained = read_trained(run, config)
    if not trained.learned:
        raise ConfigError(f"{run.path} has not finished a round yet; there is nothing to export")
    return write_export(trained, config, folder, options, say)


def read_trained(
    run: RunFolder, config: ServeConfig, checkpoint: Checkpoint | None = None
) -> Trained:
    """Return what devices and coordinator have learned together by a checkpoint of a run.

    Args:
        run: The run.
        config: Its config.
        checkpoint: One of its checkpoints; None: that of its result.

    Raises:
        StorageError: there is no checkpoint, or it cannot be read.
    """
    source = ModelSource(
        config.model, config.task, num_labels=len(config.label_names), revision=config.revision
    )
    source.load_whole(config.training.seed)
    targets = find_targets(source.config, config.task, source.layout, config.lora)
    facts = ModelFacts(source.layout, targets)
    ledger = Ledger(facts, config.lora, config.aggregation, None, config.training.seed)
    checkpoint = checkpoint or result_checkpoint(run, config)
    for damage in checkpoint.damaged:
        log.warning("checkpoint.damaged path=%s reason=%s", damage.checkpoint, damage.reason)
    ledger.load_state(checkpoint.arrays["ledger"])
    done = checkpoint.state["round"]
    return Trained(source, ledger.global_factors(), ledger.head, run_facts(run, done))


def write_export(
    trained: Trained, config: ServeConfig, folder: Path, options: ExportOptions, say: Say
) -> float:
    """Write what was *trained* as *options* say; return the largest difference of a logit."""
    _check_result(trained, options)
    if options.max_rank is not None:
        trained = _cut(trained, config, options.max_rank, say)
    with private_files():  # an adapter tells of the data; who wants to share it opens the folder
        difference = _write(trained, folder, options, say)
    if options.push_to_hub is not None:
        say(f"pushed to {push(folder, options.push_to_hub, public=options.public)}")
    return difference


def _check_result(trained: Trained, options: ExportOptions) -> None:
    """Refuse what a format cannot hold."""
    if options.format != "merged" and not trained.learned:
        raise ConfigError(
            f"--format {options.format}: all weights of this run were trained, there is no "
            "adapter; use --format merged"
        )
    if options.format in ("vllm", "gguf") and any(map(is_stacked, trained.learned.values())):
        raise ConfigError(
            f"--format {options.format}: adapters on experts have no place there; use --format "
            "peft or merged"
        )
    if options.format in ("vllm", "gguf") and trained.head:
        raise ConfigError(
            f"--format {options.format}: a classifier's head was trained, too "
            f"({', '.join(sorted(trained.head))}), and has no place there; use --format peft or "
            "merged"
        )


def _write(trained: Trained, folder: Path, options: ExportOptions, say: Say) -> float:
    source, learned, head, facts = trained
    match options.format:
        case "merged":
            difference = export_merged(source, learned, head, folder, facts, dtype=options.dtype)
            if difference > TOLERANCE:
                dtype = json.loads((folder / "config.json").read_bytes())["dtype"]
                say(f"rounding to {dtype} changes the logits; --dtype float32 does not")
            return difference
        case "gguf":
            converter = find_converter(options.llama_cpp)
            return export_gguf(source, learned, folder, converter, facts)
        case "vllm":
            difference = export_uniform(source, learned, folder, facts)
            _say_rank(learned, say)
            return difference
        case "peft":
            return export_adapter(source, learned, head, folder, facts)


def _say_rank(learned: Mapping[str, Factors], say: Say) -> None:
    most = max(factors.rank for factors in least_ranks(learned).values())
    rank = vllm_rank(most)
    text = f"all weights have rank {rank}" + (f", padded from {most}" if most < rank else "")
    if rank > VLLM_DEFAULT_RANK:
        text += (
            f"; start vLLM with --max-lora-rank {rank} (without it takes {VLLM_DEFAULT_RANK}), or "
            f"export with --max-rank {VLLM_DEFAULT_RANK}"
        )
    say(text)


# ---- cutting ranks ----


def _cut(trained: Trained, config: ServeConfig, max_rank: int, say: Say) -> Trained:
    """Keep the largest *max_rank* singular values of each weight's dW, and say what that costs."""
    errors, kept = {}, {}
    for name, factors in trained.learned.items():
        kept[name], errors[name] = compress(factors, max_rank)
    say(_cut_text(max_rank, errors))
    cut = trained._replace(learned=kept)
    batches = _eval_batches(config, say)
    if batches:
        before, after = (_eval_loss(config, t, batches) for t in (trained, cut))
        say(f"evaluation loss: {before:.4f} with all ranks, {after:.4f} with {max_rank}")
    return cut


def _cut_text(max_rank: int, errors: Mapping[str, float]) -> str:
    lossy = {name: error for name, error in errors.items() if error > 0.0}
    if not lossy:
        return f"cut to rank {max_rank}: nothing is lost, no weight has more"
    worst = sorted(lossy, key=lambda name: (-lossy[name], name))[:MOST_SHOWN]
    shown = ", ".join(f"{name} {lossy[name]:.2%}" for name in worst)
    median = statistics.median(errors.values())
    return (
        f"cut to rank {max_rank}: {len(lossy)} of {len(errors)} weights lose something of dW "
        f"(relative, Frobenius norm; median {median:.2%}); most: {shown}"
    )


def _eval_batches(config: ServeConfig, say: Say) -> list[MicroBatch]:
    """Return the run's evaluation data; nothing where there is none, or none any more."""
    if config.evaluation.data.path is None:
        return []
    try:
        return ServerModel(config).eval_batches
    except DataError as error:
        say(f"the evaluation loss is not compared: {error}")
        return []


def _eval_loss(config: ServeConfig, trained: Trained, batches: list[MicroBatch]) -> float:
    """Return the mean loss per target."""
    sums = trained_sums(config, trained, batches)
    return sums.loss_sum / max(1, sums.num_targets)


def trained_sums(config: ServeConfig, trained: Trained, batches: list[MicroBatch]) -> TailSums:
    """Return what a trained model, in the base of its run, finds on *batches*."""
    model = TrainedModel(config, trained.source, trained.learned, trained.head)
    return model.evaluate(batches)
