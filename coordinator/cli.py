"""The `coordinator` command. Exit codes: 0 done, 130 stopped, others as in `edge_sdk/errors.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from coordinator.commands.audit_privacy import add_audit_privacy
from coordinator.commands.check import add_check
from coordinator.commands.compare import add_compare
from coordinator.commands.deployment.deploy import add_deploy
from coordinator.commands.deployment.health import add_health
from coordinator.commands.devices.client import add_client, add_keygen
from coordinator.commands.devices.enrol import add_enrol
from coordinator.commands.examples import EXAMPLES
from coordinator.commands.experiment import add_experiment
from coordinator.commands.export import add_export, add_report
from coordinator.commands.init import add_init
from coordinator.commands.looking.page import add_page
from coordinator.commands.looking.status import add_status
from coordinator.commands.parser import complete_words
from coordinator.commands.plan import add_plan
from coordinator.commands.presets import add_presets
from coordinator.commands.serve import add_resume, add_serve
from coordinator.commands.simulate import add_simulate
from coordinator.commands.steer.generate import add_generate
from coordinator.commands.steer.leave import add_pause, add_stop
from coordinator.commands.steer.lr_find import add_lr_find
from coordinator.commands.steer.score import add_score
from edge_sdk.arguments import Arguments, add_examples
from edge_sdk.command import add_log_level, run_command

COMMANDS = (
    add_init,
    add_serve,
    add_resume,
    add_check,
    add_plan,
    add_lr_find,
    add_simulate,
    add_compare,
    add_audit_privacy,
    add_experiment,
    add_status,
    add_health,
    add_deploy,
    add_pause,
    add_stop,
    add_generate,
    add_score,
    add_page,
    add_report,
    add_export,
    add_presets,
    add_keygen,
    add_enrol,
    add_client,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `coordinator` command and return its exit code."""
    return run_command(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Arguments(
        prog="coordinator",
        description="Fine-tune a model across devices that keep their data.",
        epilog="Exit codes: docs/operations.md.",
    )
    add_log_level(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    add_examples(parser, EXAMPLES)
    complete_words(parser)
    return parser
