"""The `coordinator` command. Exit codes: 0 done, 130 stopped, others as in `edge_sdk/errors.py`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from coordinator.commands.compare import add_compare
from coordinator.commands.experiment import add_experiment
from coordinator.commands.plan import add_plan
from coordinator.commands.simulate import add_simulate
from coordinator.config.presets import NAMES, load_serve_config, preset_text, preset_title
from coordinator.config.run import ServeConfig
from coordinator.gateway.allow_list import AllowList
from coordinator.results.run_folder import CONFIG, RunFolder
from edge_sdk.command import quiet_libraries
from edge_sdk.config.loader import load_config
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError, EdgeError, one_line
from edge_sdk.transport.keys import create_key_pair, fingerprint, load_public_key


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `coordinator` command and return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    if options.log_level != "debug":
        quiet_libraries()
    try:
        code: int = options.run(options)
    except EdgeError as error:
        print(f"coordinator: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coordinator",
        description="Fine-tune a model across devices that keep their data.",
        epilog="Exit codes: docs/operations.md.",
    )
    parser.add_argument("-V", "--version", action="version", version=metadata.version("edgesplit"))
    parser.add_argument(
        "--log-level", default="warning", choices=("debug", "info", "warning", "error")
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_resume(commands)
    add_plan(commands)
    add_simulate(commands)
    add_compare(commands)
    add_experiment(commands)
    _add(commands, "status", "where a run stands", _status, run_folder=True, formats=True)
    export = _add(commands, "export", "write a run's adapter or model", _export, run_folder=True)
    export.add_argument("--to", type=Path, required=True, help="folder to write")
    export.add_argument("--merged", action="store_true", help="the whole model, adapter merged in")
    _add_presets(commands)
    keygen = _add(commands, "keygen", "make the coordinator's key pair", _keygen)
    keygen.add_argument("path", nargs="?", default="coordinator.key", help="default: %(default)s")
    _add_client(commands)
    return parser


def _add(
    commands: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    *,
    run_folder: bool = False,
    formats: bool = False,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    if run_folder:
        parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    if formats:
        parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser


def _add_serve(commands: Any) -> None:
    serve = _add(commands, "serve", "start a run and serve it to its end", _serve)
    serve.add_argument("--config", type=Path, help="YAML file; keys in docs/configuration.md")
    serve.add_argument("--preset", metavar="NAME", help="a method; see `coordinator presets list`")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _add_resume(commands: Any) -> None:
    resume = _add(commands, "resume", "go on with a run", _resume, run_folder=True)
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")


def _add_presets(commands: Any) -> None:
    parser = commands.add_parser("presets", help="published methods as configurations")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add(verbs, "list", "list the presets", _list_presets, formats=True)
    show = _add(verbs, "show", "print a preset", _show_preset)
    show.add_argument("name")


def _add_client(commands: Any) -> None:
    parser = commands.add_parser("client", help="who may take part")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    register = _add(verbs, "register", "allow a device", _register)
    register.add_argument("name", help="name of the device in this coordinator's runs")
    register.add_argument("key", help="its public key, or the file that holds it")
    unregister = _add(verbs, "unregister", "no longer allow a device", _unregister)
    unregister.add_argument("name")
    listing = _add(verbs, "list", "list the allowed devices", _list, formats=True)
    for verb in (register, unregister, listing):
        verb.add_argument(
            "--allow-list", type=Path, default=Path("devices.yaml"), help="default: %(default)s"
        )


def _serve(options: argparse.Namespace) -> int:
    from coordinator.lab.centralised.run import serve_pooled
    from coordinator.rounds.launch import serve

    config = load_serve_config(options.config, options.overrides, preset=options.preset)
    if config.trained_by == "coordinator":
        return _watch(config.total_steps, lambda watcher: serve_pooled(config, watcher))
    return _watch(config.total_steps, lambda watcher: serve(config, watcher))


def _resume(options: argparse.Namespace) -> int:
    from coordinator.lab.centralised.run import resume_pooled
    from coordinator.rounds.launch import resume

    RunFolder.open(options.folder)
    config = load_config(ServeConfig, options.folder / CONFIG, options.overrides, env={})
    go_on = resume_pooled if config.trained_by == "coordinator" else resume
    return _watch(
        config.total_steps, lambda watcher: go_on(options.folder, watcher, options.overrides)
    )


def _watch(total_steps: int, run: Callable[[Any], str]) -> int:
    from coordinator.results.console import Console
    from coordinator.rounds.loop import COMPLETED

    with Console(total_steps) as console:
        outcome = run(console)
    return 0 if outcome == COMPLETED else INTERRUPTED_EXIT_CODE


def _status(options: argparse.Namespace) -> int:
    from rich.console import Console as RichConsole

    from coordinator.results.console import summary

    folder = RunFolder.open(options.folder)
    config = load_config(ServeConfig, options.folder / CONFIG, env={})
    rows, events = folder.rows("metrics.jsonl"), folder.rows("events.jsonl")
    facts = {
        "run": folder.name,
        "rounds": config.rounds,
        "rounds_done": rows[-1]["round"] if rows else 0,
        "last_event": events[-1] if events else None,
        "checkpoints": [path.name for path in folder.checkpoints()],
        "metrics": rows[-1] if rows else None,
    }
    if options.format == "json":
        print(json.dumps(facts, indent=2))
        return 0
    last = facts["last_event"]
    print(f"run {folder.name}: {facts['rounds_done']} of {config.rounds} rounds", end="")
    print(f"; {last['event']} at {last['time']}" if isinstance(last, dict) else "")
    RichConsole(highlight=False).print(summary(folder))
    return 0


def _export(options: argparse.Namespace) -> int:
    from coordinator.lab.centralised.run import export_pooled
    from coordinator.results.export import export_run

    if options.to.exists() and any(options.to.iterdir()):
        raise ConfigError(f"{options.to} exists and is not empty; choose another folder")
    folder = RunFolder.open(options.folder)
    config = load_config(ServeConfig, folder.path / CONFIG, env={})
    export = export_pooled if config.trained_by == "coordinator" else export_run
    difference = export(folder, options.to, merged=options.merged)
    what = "adapter" if (options.to / "adapter_config.json").exists() else "model"
    print(f"{what} written to {options.to}; read back, logits differ by {difference:.0e} at most")
    return 0


def _list_presets(options: argparse.Namespace) -> int:
    titles = {name: preset_title(name) for name in NAMES}
    if options.format == "json":
        print(json.dumps(titles, indent=2))
        return 0
    for name, title in titles.items():
        print(f"{name:<12} {title}")
    return 0


def _show_preset(options: argparse.Namespace) -> int:
    print(preset_text(options.name), end="")
    return 0


def _keygen(options: argparse.Namespace) -> int:
    pair = create_key_pair(options.path)
    print(f"secret key: {options.path} (mode 0600)")
    print(f"public key: {pair.public}  fingerprint {fingerprint(pair.public)}")
    return 0


def _register(options: argparse.Namespace) -> int:
    AllowList(options.allow_list).register(options.name, load_public_key(options.key))
    print(f"{options.name} may take part")
    return 0


def _unregister(options: argparse.Namespace) -> int:
    AllowList(options.allow_list).unregister(options.name)
    print(f"{options.name} may no longer take part")
    return 0


def _list(options: argparse.Namespace) -> int:
    devices = AllowList(options.allow_list).devices()
    if options.format == "json":
        print(json.dumps(devices, indent=2))
        return 0
    for name, key in sorted(devices.items()):
        print(f"{name:<20} {fingerprint(key)}")
    return 0
