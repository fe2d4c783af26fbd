"""`coordinator score`: loss and scores of a run's model on a file, by one of its checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.commands.parser import add_command
from coordinator.commands.steer.trained import add_choice, read_after
from coordinator.commands.terminal import say_import
from coordinator.config.run import ServeConfig
from coordinator.config.scoring import SCORES
from coordinator.results.json_text import json_text
from coordinator.results.lifecycle import read_run
from edge_sdk.errors import ConfigError
from edge_sdk.files import atomic_write

if TYPE_CHECKING:
    from coordinator.export.asked.scoring import Written

TEXT = "measure the model of a run on a file: its loss, and scores of what it writes or finds there"


def add_score(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = add_command(commands, "score", TEXT, _score, run_folder=True, formats=True)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="read as evaluation.data says; default: the run's evaluation.test_file, else its "
        "evaluation.data.path",
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        choices=tuple(SCORES),
        metavar="NAME",
        help=f"{', '.join(SCORES)}; default: the run's evaluation.scores",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="also write prompts, texts and references there, as JSON lines",
    )
    add_choice(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _score(options: argparse.Namespace) -> int:
    folder, config = read_run(options.folder, options.overrides)
    config = _on_file(config, options)
    say_import()
    from coordinator.engine.server_model import ServerModel
    from coordinator.export.outcome import measured
    from coordinator.scores.measures import require_programs

    require_programs(config.evaluation.scores)
    batches = ServerModel(config).eval_batches
    trained, name = read_after(folder, config, options.round)
    found, written = measured(config, trained, batches, None)
    if options.texts is not None:
        atomic_write(options.texts, _lines(written).encode(), mode=0o666)
    if options.format == "json":
        print(json_text({"by": name, **found}))
        return 0
    sys.stderr.write(f"run {folder.name} by {name}, {config.evaluation.data.path}\n")
    for title, value in _rows(found):
        print(f"{title:<11}{value:>12}")
    return 0


def _on_file(config: ServeConfig, options: argparse.Namespace) -> ServeConfig:
    """Return the run as one whose evaluation file is the one that is asked for."""
    evaluation = config.evaluation
    file = options.data or evaluation.test_file or evaluation.data.path
    if file is None:
        raise ConfigError("--data: name a file; the run has neither a test file nor another one")
    scores = evaluation.scores if options.scores is None else tuple(options.scores)
    if options.texts is not None and not any(SCORES[name].is_of_text for name in scores):
        raise ConfigError("--texts: nothing is written without a score of texts; add --scores")
    data = replace(evaluation.data, path=file)
    device = options.device or config.device
    try:
        evaluation = replace(evaluation, data=data, test_file=None, scores=scores)
        return replace(config, evaluation=evaluation, device=device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _rows(found: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return what was found as lines of a table, scores as papers have them."""
    forms = {"loss": ".4f", "perplexity": ",.2f", "accuracy": ".1%", "targets": ",.0f"}
    rows = [(name, format(found[name], form)) for name, form in forms.items() if name in found]
    return rows + [(k.title, k.text(found[name])) for name, k in SCORES.items() if name in found]


def _lines(written: list[Written]) -> str:
    rows = ({"prompt": w.prompt, "text": w.text, "references": w.references} for w in written)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
