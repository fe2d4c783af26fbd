"""Numbers as a run of Weights & Biases, online or offline as its `WANDB_MODE` says.

Sent: numbers and how the run is trained. Not sent: the machine's name, its load, code and console.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import psutil

from coordinator.config.run import ServeConfig
from coordinator.tracking.names import Moment, TrackedRun
from edge_sdk.errors import ConfigError

STEP = "train/global_step"
# The library's own process, which it starts for us.
_PROCESS = "wandb-core"
# Seconds for it to end by itself.
GOODBYE_S = 1.0
# Nobody at a terminal is asked anything, and nothing but numbers leaves.
_SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def check_wandb(_: ServeConfig) -> None:
    """Make sure that somebody is logged in, where numbers go to a service.

    Raises:
        ConfigError: nobody is: the library would ask at the terminal.
    """
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    if not _is_logged_in(_library()):
        raise ConfigError(
            "report_to: nobody is logged in to wandb: `wandb login`, or WANDB_MODE=offline and "
            "`wandb sync` later"
        )


class WandbRun:
    """Logs to one run of wandb, also when ours is resumed."""

    takes_live = False

    def open(self, about: TrackedRun) -> str:
        """Begin a run, or go on with the one of that id."""
        wandb = _library()
        known = type(wandb.Settings()).model_fields
        settings = {name: value for name, value in _SETTINGS.items() if name in known}
        folder = about.folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=about.config.tracking.project,
            name=about.name,
            id=about.ident,
            resume="allow",
            dir=str(folder),
            config=about.facts,
            settings=wandb.Settings(**settings),
        )
        self._run.define_metric("*", step_metric=STEP)
        return str(self._run.id)

    def take(self, samples: Sequence[Moment]) -> None:
        """Log the numbers, those of one step together."""
        by_step: dict[int, dict[str, float]] = {}
        for sample in samples:
            row = by_step.setdefault(sample.step, {STEP: sample.step})
            for name, value, device in sample.numbers:
                row[name if device is None else f"device/{device}/{name}"] = value
        for row in by_step.values():
            self._run.log(row)

    def close(self, *, completed: bool) -> None:
        """End the run; one that is not completed goes on under its id."""
        self._run.finish(exit_code=0 if completed else 1)

    def abandon(self) -> None:
        """End its process, for which a program otherwise waits at its end as long as that does."""
        ending = threading.Thread(target=_tear_down, name="edgesplit-wandb-end", daemon=True)
        ending.start()
        ending.join(GOODBYE_S)  # it has taken back by then what it does when a program ends
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.name().startswith(_PROCESS):
                    child.kill()


def _tear_down() -> None:
    with suppress(Exception):  # whatever it says of a process that is gone
        _library().teardown()


def _is_logged_in(wandb: Any) -> bool:
    """Return whether it knows a key, without asking anybody for one."""
    if "prompt" in signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # releases before that


def _library() -> Any:
    # Its own reports of errors go to a third party.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb
