"""Train the fixed runs of scripts/same-bits with the code of one checkout, the first on PYTHONPATH.

What the runs are is in same_bits_cases.py; nothing is compared here. Uses the two command lines
alone, so that it drives checkouts whose modules lie elsewhere. Every command is a process of its
own, real sockets between them, forked from this one: the heavy libraries are imported once.

python scripts/same_bits_run.py CHECKOUT INPUTS CASE...      in the folder to write to
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from same_bits_cases import DEVICES, Case, case_of

# What every process would import by itself. The backward pass may not have run before a fork, nor
# may any thread: nothing is computed here.
HEAVY = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "peft",
    "safetensors.torch",
    "onnxruntime",
    "rich.console",
)
CASES_AT_ONCE = 2
# A run of which nothing new is written for so long hangs. It is no bound on a whole run: that takes
# half a minute of computation, and any number of minutes where others compute on the machine.
PATIENCE_S = 300.0
STOP_S = 5.0
TAIL_LINES = 15
KEYS = Path("keys")
COORDINATOR_KEY = KEYS / "coordinator.key"
# Settings that older checkouts do not know; they do what the cases say without them.
NEWER = ("waves",)
ALLOW_LIST = KEYS / "devices.yaml"


class Failed(Exception):
    """A command of a case failed; the message says which and shows the end of its log."""


class Trial:
    """The processes of one case."""

    def __init__(self, case: Case, inputs: Path) -> None:
        self.case = case
        self._folder = Path(case.name)
        self._seen, self._until_s = 0.0, 0.0
        self._port = reserved_port()
        self._processes: list[BaseProcess] = []
        if case.command == "simulate":
            self._start("coordinator", "simulate", config=case.run_settings(inputs))
            return
        address = f"tcp://127.0.0.1:{self._port.getsockname()[1]}"
        serve = {"listen": address, "secret_key": key_path("coordinator"), "patience_s": PATIENCE_S}
        serve["allow_list"] = str(ALLOW_LIST.resolve())
        self._start("coordinator", "serve", config=case.run_settings(inputs) | serve)
        for name in case.devices:
            join = {"coordinator": address, "server_key": f"{COORDINATOR_KEY}.pub"}
            join |= {"secret_key": key_path(name), "patience_s": PATIENCE_S}
            self._start(name, "run", config=case.device_settings(name, inputs) | join)

    def _start(self, who: str, verb: str, config: dict[str, Any]) -> None:
        home = self._folder / who
        home.mkdir(parents=True)
        path = home / "config.yaml"
        known = {n: v for n, v in config.items() if n not in NEWER or verb == "run" or is_known(n)}
        path.write_text(yaml.safe_dump(known, sort_keys=False), encoding="utf-8")
        entry = command_line("edge_sdk" if verb == "run" else "coordinator")
        arguments = (entry, [verb, "--config", str(path)], home / "log.txt")
        process = multiprocessing.get_context("fork").Process(
            target=command, args=arguments, name=who
        )
        process.start()
        self._processes.append(process)

    def is_done(self) -> bool:
        """Whether all its processes have ended well.

        Raises:
            Failed: one has not, or nothing happens any more.
        """
        for process in self._processes:
            if process.exitcode:
                raise Failed(f"{self._told(process)} ended with exit code {process.exitcode}")
        left = [process for process in self._processes if process.exitcode is None]
        if left and self._is_quiet():
            raise Failed(f"{self._told(left[0])} hangs: nothing new for {PATIENCE_S:.0f} s")
        return not left

    def _is_quiet(self) -> bool:
        """Whether none of the case's files has been written for too long."""
        seen, now = max(written_s(self._folder), default=0.0), time.monotonic()
        if seen != self._seen:
            self._seen, self._until_s = seen, now + PATIENCE_S
        return now > self._until_s

    def _told(self, process: BaseProcess) -> str:
        """Show the end of its log, and return what to call it."""
        text = (self._folder / process.name / "log.txt").read_text(encoding="utf-8")
        print("\n".join(text.splitlines()[-TAIL_LINES:]), file=sys.stderr)
        return f"{self.case.name}: {process.name}"

    def close(self) -> None:
        """End what is left; the coordinator may have a process of its own to end."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(STOP_S)
            process.kill()
            process.join()
        self._port.close()


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that no process is left behind
    checkout, inputs = Path(arguments[0]), Path(arguments[1])
    for package in ("coordinator", "edge_sdk"):
        found = Path(str(importlib.import_module(package).__file__))
        if not found.is_relative_to(checkout):
            print(f"same-bits: {package} is {found}, not that of {checkout}", file=sys.stderr)
            return 2
    for module in HEAVY:
        with contextlib.suppress(ModuleNotFoundError):  # each is only a head start
            importlib.import_module(module)
    make_keys()
    try:
        run([case_of(name) for name in arguments[2:]], inputs)
    except Failed as failure:
        print(f"same-bits: {checkout}: {failure}", file=sys.stderr)
        return 2
    return 0


def run(cases: Sequence[Case], inputs: Path) -> None:
    """Run all cases, a few at a time."""
    waiting, running = list(cases), list[Trial]()
    try:
        while waiting or running:
            while waiting and len(running) < CASES_AT_ONCE:
                running.append(Trial(waiting.pop(0), inputs))
            for trial in list(running):
                if trial.is_done():
                    running.remove(trial)
                    trial.close()
            time.sleep(0.2)
    finally:
        for trial in running:
            trial.close()


def written_s(folder: Path) -> Iterator[float]:
    """When each file below *folder* was written last."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # checkpoints go
            yield path.stat().st_mtime


def is_known(setting: str) -> bool:
    """Whether the checkout's coordinator has a setting of that name, as its documentation says."""
    package = Path(str(importlib.import_module("coordinator").__file__)).parent
    text = (package.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    return f"| `{setting}` |" in text


def command_line(package: str) -> Callable[[Sequence[str]], int]:
    """The entry of one of our commands."""
    entry: Callable[[Sequence[str]], int] = importlib.import_module(f"{package}.cli").main
    return entry


def command(entry: Callable[[Sequence[str]], int], arguments: Sequence[str], log: Path) -> None:
    """Be one of our commands, in a forked process that writes to *log*."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(entry(arguments))


def make_keys() -> None:
    """Make a key pair for everybody, and put the devices on the coordinator's list."""
    shutil.rmtree(KEYS, ignore_errors=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        called("coordinator", "keygen", str(COORDINATOR_KEY))
        for name in DEVICES:
            called("edge_sdk", "keygen", key_path(name))
            register = ("client", "register", name, f"{key_path(name)}.pub")
            called("coordinator", *register, "--allow-list", str(ALLOW_LIST))


def called(package: str, *arguments: str) -> None:
    """Run a command that computes nothing in this process."""
    if code := command_line(package)(arguments):
        raise Failed(f"{package} {' '.join(arguments)} ended with exit code {code}")


def key_path(who: str) -> str:
    """Where the secret key of *who* lies."""
    return str((KEYS / f"{who}.key").resolve())


def reserved_port() -> socket.socket:
    """A port that nobody else is given while this socket is open, and that may be listened on."""
    reserved = socket.socket()
    # ZeroMQ sets it as well; two such sockets may have one port as long as one of them is silent.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
