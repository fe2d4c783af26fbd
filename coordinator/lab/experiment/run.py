"""One run of an experiment: start it, let faults happen, restart boards that die, leave nothing.

What outlives a run (keys, folders, relays) belongs to `testbed.py`; `faults.py` says when a fault
happens.
"""

from __future__ import annotations

import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.lab.experiment.board_run import BoardRun
from coordinator.lab.experiment.completed_runs import (
    COMPLETED,
    FACTS,
    HAPPENINGS,
    INTERRUPTED,
    MARKS,
    UNFINISHED,
    digest,
)
from coordinator.lab.experiment.config import EVERYWHERE, ExperimentConfig, FaultConfig
from coordinator.lab.experiment.faults import FaultSchedule
from coordinator.remote.shell import LocalShell, Program
from coordinator.results.run_folder import RunFolder
from edge_sdk.config.describe import dump_config
from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError

TICK_S = 0.05
# Seconds for the coordinator to begin and to stop with a checkpoint, and for boards to leave.
BEGIN_S, STOP_S, GOODBYE_S = 600.0, 60.0, 15.0
STEPS = "steps.jsonl"


class ExperimentRun:
    """One run.

    Args:
        config: The experiment.
        serve_config: Configuration of the coordinator.
        boards: The boards by name; their hosts are prepared.
        server_key: The coordinator's public key.
        workspace: A folder for files that need not be kept.
        progress: Gets a line for a person.
        stop: Ends the run early when it is set.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        serve_config: ServeConfig,
        boards: dict[str, BoardRun],
        *,
        server_key: str,
        workspace: Path,
        progress: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._config, self._serve_config, self._boards = config, serve_config, boards
        self._server_key, self._workspace = server_key, workspace
        self._progress, self._stop = progress, stop
        assert serve_config.name is not None
        self.folder = RunFolder(serve_config.runs / serve_config.name)
        self._lines: queue.Queue[str] = queue.Queue()
        self._schedule = FaultSchedule(config.faults)
        self._steps: dict[str, int] = {}
        self._has_begun = False
        self._began_s = time.monotonic()
        self._coordinator: Program | None = None
        self._digest = digest(config)
        self._where: tuple[str, int] | None = None
        """Host and port of the coordinator, as this machine reaches it."""
        self._patience = Deadline.after(STOP_S)
        self._dark: set[str] = set()
        """Boards without power."""
        self._broken = ""
        """A fault that could not be carried out; empty while there is none."""
        self._why = ""
        """Why the run was stopped; empty while it goes on."""

    def run(self) -> str:
        """Run it to its end; return `completed`, `interrupted`, or why it failed."""
        try:
            self._start_coordinator()
            self._began_s = time.monotonic()
            self._keep_facts(UNFINISHED)
            for board in self._boards.values() if self._where else ():
                self._start(board)
            while not self._of_coordinator().is_over:
                self._turn()
            self._say_goodbye()
        finally:
            self._end_everything()
        outcome = self._outcome()
        self._keep_facts(outcome)
        return outcome

    def _turn(self) -> None:
        self._listen(TICK_S)
        for fault, begins in self._schedule.due(self._now_s(), self._steps):
            try:
                self._carry_out(fault, begins=begins)
            except (EdgeError, OSError) as error:
                self._broken = f"{fault.board}: {fault.do} cannot be carried out: {error}"
        for board in self._boards.values():
            self._look_after(board)
        if not self._why and (why := self._reason_to_stop()):
            self._why = why
            self._happened("coordinator", f"stopping: {why}")
            self._of_coordinator().signal(signal.SIGINT)
            self._patience = Deadline.after(STOP_S)
        elif self._why and not self._patience.left_s():
            self._of_coordinator().signal(signal.SIGKILL)

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _of_coordinator(self) -> Program:
        assert self._coordinator is not None
        return self._coordinator

    # ---- the coordinator ----

    def _start_coordinator(self) -> None:
        file = self._workspace / f"{self.folder.name}.yaml"
        file.write_text(dump_config(self._serve_config), encoding="utf-8")
        least = str(self._config.min_devices)
        self._coordinator = Program(
            LocalShell(),
            [
                sys.executable,
                "-u",
                "-m",
                "coordinator.lab.experiment.coordinator_process",
                str(file),
                least,
            ],
            folder=str(Path.cwd()),
            environment={"OMP_NUM_THREADS": str(self._config.experiment.coordinator_threads)},
            on_line=self._lines.put,
        )
        patience = Deadline.after(BEGIN_S)
        while self._where is None and not self._coordinator.is_over:
            self._listen(TICK_S)
            if self._stop.is_set() or not patience.left_s():
                self._why = INTERRUPTED if self._stop.is_set() else "the coordinator never listened"
                self._coordinator.close()

    def _listen(self, timeout_s: float) -> None:
        """Take in what the coordinator has said."""
        try:
            line = self._lines.get(timeout=timeout_s)
            while True:
                self._take(line)
                line = self._lines.get_nowait()
        except queue.Empty:
            return

    def _take(self, line: str) -> None:
        try:
            said = json.loads(line)
            kind = {"note", "begins", "step", "row", "error"} & said.keys()
        except (ValueError, AttributeError):  # not ours: a warning, a traceback
            self._log("coordinator", line)
            return
        if "step" in kind:
            device = said["device"]
            self._steps[device] = max(said["step"], self._steps.get(device, 0))
            self.folder.append(STEPS, said)
        elif "error" in kind:
            self._why = said["error"]
        elif "begins" in kind:
            self._begin(said)
        elif "row" in kind:
            self._progress(f"{self.folder.name}: round {said['row']['round']}{_score(said['row'])}")
            if said["row"]["round"]:  # row 0 comes before the clock starts
                self._mark(said, said["row"]["round"])
        else:
            self._log("coordinator", said.get("note", line))
            if said.get("address"):
                self._where = here(said["address"])

    def _begin(self, said: dict[str, Any]) -> None:
        """Start the clock with the first round: it does not count the loading of blocks."""
        if not self._has_begun:
            self._has_begun = True
            self._mark(said, 0)

    def _mark(self, said: dict[str, Any], round_: int) -> None:
        """Write down what boards and links had used when so many rounds were done."""
        relays = {name: board.relay for name, board in self._boards.items() if board.relay}
        links = {name: asdict(relay.usage()) for name, relay in relays.items()}
        mark = {"round": round_, "time": said["time"], "cpu_s": said["cpu_s"]}
        self.folder.append(MARKS, {**mark, "links": links, "energy_j": said["energy_j"]})

    # ---- the boards ----

    def _start(self, board: BoardRun) -> None:
        """Start a board's program; a failure to start counts as its death."""
        assert self._where is not None
        try:
            settings = board.host.settings(
                self._config, board.address(self._where), self._server_key, self.folder.name
            )
            log = partial(self._log, board.name)
            board.start(settings, self._workspace, log, self._now_s())
        except (EdgeError, OSError) as error:
            self._happened(board.name, f"cannot be started: {error}")
            self._plan_restart(board, None)

    def _look_after(self, board: BoardRun) -> None:
        if board.program is not None and board.program.is_over:
            killed = board.num_killed
            code = self._end_program(board)
            how = "out of reach" if code is None else _exit_text(code)
            memory = ", out of memory" if board.num_killed > killed else ""
            self._happened(board.name, how + memory)
            self._plan_restart(board, code)
        if board.restart_at_s is not None and self._now_s() >= board.restart_at_s:
            self._happened(board.name, "started again")
            self._start(board)

    def _end_program(self, board: BoardRun) -> int | None:
        """End a board's program; report what cannot be removed, and go on."""
        try:
            return board.end_program()
        except (EdgeError, OSError) as error:
            self._happened(board.name, str(error))
            return board.exits[-1]

    def _plan_restart(self, board: BoardRun, code: int | None) -> None:
        if board.name not in self._dark and not self._schedule.brings_back(board.name):
            board.plan_restart(code, self._now_s(), self._config.experiment.restarts)

    def _reason_to_stop(self) -> str:
        if self._stop.is_set():
            return INTERRUPTED
        if self._broken:
            return self._broken
        limit_s = self._config.experiment.limit_s
        if limit_s is not None and self._now_s() > limit_s:
            return f"experiment.limit_s: {limit_s:g} s are over"
        brings_back = self._schedule.brings_back
        left = [n for n, board in self._boards.items() if board.is_there or brings_back(n)]
        needed = self._config.min_devices if self._steps else len(self._boards)
        if len(left) >= needed:
            return ""
        gone = ", ".join(sorted(self._boards.keys() - left))
        when = "" if self._steps else " before the run began"
        return f"{gone} died{when}, and {len(left)} of at least {needed} boards are left"

    def _carry_out(self, fault: FaultConfig, *, begins: bool) -> None:
        board = self._boards[fault.board]
        number = next(n for n, each in enumerate(self._config.faults) if each is fault)
        text = f"{fault.do} {'begins' if begins else 'ends'}"
        self._happened(fault.board, text, fault=number, begins=begins)
        if fault.do in ("link", "cut"):
            board.change_link(self._config, fault, begins=begins)
        elif fault.do == "throttle":
            board.slow_down(fault.factor if begins and fault.factor else 1.0)
        elif begins:
            if fault.do == "power-cut":
                self._dark.add(board.name)
            board.switch_off(quietly=fault.do == "power-cut")
        else:
            self._dark.discard(board.name)
            board.reconnect()
            if board.program is not None:  # its end has not been noticed yet
                self._happened(board.name, _exit_text(self._end_program(board)))
            self._start(board)

    # ---- the end ----

    def _say_goodbye(self) -> None:
        """Give boards time to end by themselves, if they know that the run is over."""
        self._listen(TICK_S)
        deadline = Deadline.after(GOODBYE_S if self._of_coordinator().exit_code == 0 else 0.0)
        for board in self._boards.values():
            if board.program is not None:
                board.program.wait(deadline.left_s())

    def _end_everything(self) -> None:
        if self._coordinator is not None:
            self._coordinator.close()
        for board in self._boards.values():
            board.restart_at_s = None
            try:
                board.reconnect()
            except (EdgeError, OSError) as error:  # its program has to end all the same
                self._happened(board.name, str(error))
        # At the same time: each of them may need its grace.
        ending = [
            threading.Thread(target=self._end, args=(board,)) for board in self._boards.values()
        ]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()

    def _end(self, board: BoardRun) -> None:
        if board.program is not None:
            self._end_program(board)

    def _outcome(self) -> str:
        code = self._of_coordinator().exit_code
        if code == 0:
            return COMPLETED
        return self._why or f"the coordinator {_exit_text(code)}; see its log"

    def _keep_facts(self, outcome: str) -> None:
        facts_by_board = {name: board.facts() for name, board in self._boards.items()}
        facts = {
            "outcome": outcome,
            "digest": self._digest,
            "seconds": self._now_s(),
            "boards": facts_by_board,
        }
        if self.folder.path.is_dir():
            self.folder.write_text(FACTS, json.dumps(facts, indent=2) + "\n")

    # ---- events and logs ----

    def _happened(self, who: str, text: str, **more: Any) -> None:
        self._progress(f"{self.folder.name}: {who}: {text}")
        if self.folder.path.is_dir():
            row = {"time": time.time(), "at_s": round(self._now_s(), 3), "who": who, "text": text}
            self.folder.append(HAPPENINGS, row | more)

    def _log(self, who: str, line: str) -> None:
        """Write a line of *who* to its log; any thread may call this."""
        if not self.folder.path.is_dir():  # the coordinator could not even begin
            self._progress(f"{who}: {line}")
            return
        logs = self.folder.path / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{who}.log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def here(address: str) -> tuple[str, int]:
    """Return host and port at which this machine reaches whoever listens at *address*."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return "127.0.0.1" if host in EVERYWHERE else host.strip("[]"), int(port)


def _score(row: dict[str, Any]) -> str:
    scores = [row["eval"]] if "eval" in row else [*row.get("eval_by_device", {}).values()]
    losses = ", ".join(f"{score['loss']:.4f}" for score in scores)
    return f", loss {losses}" if losses else ""


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return "ended" if code == 0 else f"ended with exit code {code}"
