"""`coordinator generate`: what the model of a run says to prompts, by one of its checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.commands.steer.trained import add_choice, read_after
from coordinator.commands.terminal import say_import
from coordinator.config.prompts import read_prompts
from coordinator.results.lifecycle import read_run
from edge_sdk.errors import ConfigError, printable

TEXT = "let the model of a run, as it is by now or was after a round, answer prompts"


def add_generate(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = add_command(commands, "generate", TEXT, _generate, run_folder=True, formats=True)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; `-`: lines of standard input; default: the run's "
        "evaluation.prompts",
    )
    parser.add_argument(
        "--form",
        choices=("auto", "text", "completion", "chat"),
        help="what a prompt is; default: the run's evaluation.prompt_form",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: the run's, 48 if it has none"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default) takes the most likely token each time",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides what is drawn")
    add_choice(parser)


def _generate(options: argparse.Namespace) -> int:
    folder, config = read_run(options.folder, [])
    prompts = _asked(options.prompt) or read_prompts(config.evaluation)
    if not prompts:
        raise ConfigError("--prompt: give at least one; the run has no evaluation.prompts")
    say_import()
    from coordinator.engine.whole import Manner
    from coordinator.export.asked.texts import Prompting, text_ends
    from coordinator.export.trained import TrainedModel
    from edge_sdk.model.weights import load_tokenizer

    trained, name = read_after(folder, config, options.round)
    prompting = Prompting(config, load_tokenizer(trained.source.folder), options.form)
    most = config.evaluation.max_new_tokens
    manner = Manner(
        max_new_tokens=most if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        ends=tuple(text_ends(trained.source).union(prompting.ends)),
    )
    config = replace(config, device=options.device or config.device)
    model = TrainedModel(config, trained.source, trained.learned, trained.head)
    found = []
    if options.format == "text":
        drawn = f"temperature {manner.temperature:g}, seed {manner.seed}"
        how = drawn if manner.temperature else "the most likely token each time"
        sys.stderr.write(f"run {folder.name} by {name}, {prompting.form}, {how}\n")
    for prompt in prompts:
        text = prompting.text(model.continue_texts([prompting.ids(prompt)], manner)[0])
        found.append({"prompt": prompt, "text": text})
        if options.format == "text":
            _show(prompt, text, is_alone=len(prompts) == 1)
    if options.format == "json":
        print(json.dumps({"by": name, "samples": found}, indent=2))
    return 0


def _asked(prompts: list[str] | None) -> list[str]:
    found: list[str] = []
    for prompt in prompts or ():
        found += sys.stdin.read().splitlines() if prompt == "-" else [prompt]
    return found


def _show(prompt: str, text: str, *, is_alone: bool) -> None:
    """Print what was said; nothing in it moves the cursor, whatever the model has learned."""
    clean = ["\n".join(map(printable, each.split("\n"))) for each in (prompt, text)]
    sys.stdout.write(clean[1] + "\n" if is_alone else f"> {clean[0]}\n{clean[1]}\n\n")
    sys.stdout.flush()
