"""`coordinator serve` and `coordinator resume`: hold a run, to its end or until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coordinator.commands.check import check_run
from coordinator.commands.parser import add_command
from coordinator.commands.readiness.devices import Assumed, add_devices, read_devices
from coordinator.commands.terminal import say_import
from coordinator.config.presets import load_serve_config
from coordinator.config.run import ServeConfig
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.results.lifecycle import read_run
from coordinator.results.run_folder import CONFIG
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError
from profiler.sensors.memory import keep_freed


def add_serve(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    serve = add_command(commands, "serve", "start a run and serve it to its end", _serve)
    serve.add_argument("--config", type=Path, help="YAML file; keys in docs/configuration.md")
    serve.add_argument("--preset", metavar="NAME", help="a method; see `coordinator presets list`")
    serve.add_argument("--check", action="store_true", help="start nothing: `coordinator check`")
    serve.add_argument(
        "--resume", action="store_true", help="go on with the run of that name if there is one"
    )
    add_devices(serve)
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def add_resume(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    resume = add_command(commands, "resume", "go on with a run", _resume, run_folder=True)
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _serve(options: argparse.Namespace) -> int:
    config = load_serve_config(options.config, options.overrides, preset=options.preset)
    assumed = read_devices(options)
    if options.check:
        return check_run(config, assumed)
    if assumed != Assumed():
        raise ConfigError(
            "--profiles, --board, --link, --coordinator: devices and coordinator measure their own "
            "when they come; these are for --check"
        )
    if options.resume and (there := _there_already(config)) is not None:
        sys.stderr.write(f"run {there} goes on, with the config in its folder\n")
        return _go_on(there, options.overrides)
    say_import()
    keep_freed()
    from coordinator.lab.centralised.run import serve_pooled
    from coordinator.rounds.launch import serve

    if config.trained_by == "coordinator":
        return _watch(config, lambda watcher: serve_pooled(config, watcher))
    say_who_may_come(config)
    say_what_is_fixed(config)
    return _watch(config, lambda watcher: serve(config, watcher))


def _there_already(config: ServeConfig) -> Path | None:
    """Return the folder of the run that *config* names; None where it has not been begun."""
    if config.name is None:
        raise ConfigError("--resume: a run is known by its name; set name in the config")
    folder = config.runs / config.name
    return folder if (folder / CONFIG).is_file() else None


def _resume(options: argparse.Namespace) -> int:
    return _go_on(options.folder, options.overrides)


def _go_on(folder: Path, overrides: list[str]) -> int:
    _, config = read_run(folder, overrides)
    say_import()
    keep_freed()
    from coordinator.lab.centralised.run import resume_pooled
    from coordinator.rounds.launch import resume

    go_on = resume_pooled if config.trained_by == "coordinator" else resume
    if config.trained_by != "coordinator":
        say_who_may_come(config)
    return _watch(config, lambda watcher: go_on(folder, watcher, overrides))


def say_who_may_come(config: ServeConfig) -> None:
    """Say that nobody, or too few, are registered: the run would wait, and devices be refused."""
    num_devices = len(AllowList(config.allow_list).devices())
    if num_devices < config.min_devices:
        found = {0: "no device is", 1: "1 device is"}.get(num_devices, f"{num_devices} devices are")
        sys.stderr.write(
            f"coordinator: {found} registered in {config.allow_list}, and a round needs "
            f"{config.min_devices}; while it waits: coordinator enrol NAME, or "
            f"coordinator client register NAME KEY, with --allow-list {config.allow_list}\n"
        )


def say_what_is_fixed(config: ServeConfig) -> None:
    """Say what the planner will not choose, because the config has chosen already."""
    from coordinator.planning.fixed import by_hand

    for line in by_hand(config):
        sys.stderr.write(f"coordinator: {line}\n")


def _raise_descriptor_limit() -> None:
    """Allow as many open files as the system does: every connection of a device is one."""
    import resource  # what has no such limits does not have it

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # the kernel may allow less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _watch(config: ServeConfig, run: Callable[[Any], str]) -> int:
    _raise_descriptor_limit()
    from coordinator.page.beside import page_beside
    from coordinator.results.console import Console
    from coordinator.results.lifecycle import COMPLETED, STOPPED
    from coordinator.results.standing.live_file import LiveFile
    from coordinator.results.standing.service_manager import ServiceManager
    from coordinator.results.watchers import Watchers

    with (
        Console(config.total_steps) as console,
        page_beside(config.page, config.page_token, console) as shown,
    ):
        outcome = run(Watchers([shown, LiveFile(), ServiceManager()]))
    return 0 if outcome in (COMPLETED, STOPPED) else INTERRUPTED_EXIT_CODE
