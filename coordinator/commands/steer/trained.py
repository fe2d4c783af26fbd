"""What a run had learned after a round, for the commands that ask its model something."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coordinator.config.run import ServeConfig
from coordinator.results.run_folder import RunFolder

if TYPE_CHECKING:
    from coordinator.export.run import Trained


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Let a person choose the checkpoint that answers, and where it computes."""
    parser.add_argument(
        "--round",
        type=int,
        metavar="N",
        help="rounds that were done: 0 is before training; default: the newest, or the best one "
        "with early_stopping",
    )
    parser.add_argument("--device", metavar="NAME", help="where it computes; default: the run's")


def read_after(folder: RunFolder, config: ServeConfig, round_: int | None) -> tuple[Trained, str]:
    """Return what a run had learned, and the name of the checkpoint that says so.

    Args:
        folder: Of the run.
        config: Its config.
        round_: Rounds that were done: 0 is before training. None: those of the result.

    Raises:
        ConfigError: there is no checkpoint of that round.
        StorageError: it cannot be read.
    """
    from coordinator.export.run import read_trained
    from coordinator.export.run_facts import result_checkpoint
    from coordinator.lab.centralised.run import read_pooled

    if round_:
        checkpoint = folder.checkpoint_of(round_, config.steps_per_round)
    else:
        checkpoint = result_checkpoint(folder, config)
    read = read_pooled if config.trained_by == "coordinator" else read_trained
    trained = read(folder, config, checkpoint)
    name = "" if checkpoint.path is None else checkpoint.path.name
    if round_ == 0:  # nothing is learned yet: whatever checkpoint is left knows the base
        return trained._replace(learned={}, head={}), "the base model"
    return trained, name
