"""A board in one run: its program, its control groups, and how both ended.

Decides nothing: `run.py` says when it starts and stops.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.lab.experiment.board_host import BoardHost
from coordinator.lab.experiment.cgroup import CgroupLimits
from coordinator.lab.experiment.config import ExperimentConfig, FaultConfig, link_shape
from coordinator.lab.experiment.namespace import Namespace
from coordinator.lab.experiment.relay import LinkUsage, Relay
from coordinator.remote.shell import Program
from edge_sdk.errors import ConfigError, DataError, ModelError, RefusedError

# Seconds until a program that has died is started again; twice as many each time that it dies
# within the longest wait.
RESTART_S, LONGEST_RESTART_S = 1.0, 60.0
# Exit codes that another start would only repeat.
HOPELESS = {kind.exit_code for kind in (ConfigError, RefusedError, DataError, ModelError)}


@dataclass
class BoardRun:
    """A board in this run."""

    host: BoardHost
    relay: Relay | Namespace | None = None
    make_limits: Callable[[], CgroupLimits | None] = lambda: None
    cores: float = 0.0
    """Cores of an emulated board."""
    factor: float = 1.0
    """Share of its cores that it has; below 1 while it is throttled."""
    program: Program | None = None
    limits: CgroupLimits | None = None
    starts: int = 0
    started_s: float = 0.0
    """Time at which its program was last started, in seconds of the run."""
    wait_s: float = RESTART_S
    """Seconds from its next end to its next start."""
    restart_at_s: float | None = None
    """Time at which it is to be started again; None if it is not."""
    exits: list[int | None] = field(default_factory=list)
    """Exit code of each of its programs; None where it is unknown."""
    peak_bytes: int | None = None
    """Most memory of its control group, in bytes."""
    num_killed: int = 0
    """Number of its processes that the kernel ended because of the memory limit."""
    power_mode: str | None = None
    """Its power mode in this run; None: unknown."""
    used: LinkUsage | None = None
    """Usage of its relay when the run began."""

    @property
    def name(self) -> str:
        """Name of the board."""
        return self.host.name

    @property
    def is_there(self) -> bool:
        """Whether its program runs, will run again, or has ended because the run was over."""
        ended_well = bool(self.exits) and self.exits[-1] == 0
        return self.program is not None or self.restart_at_s is not None or ended_well

    def start(
        self, settings: dict[str, Any], folder: Path, log: Callable[[str], None], now_s: float
    ) -> None:
        """Start its program at *now_s*.

        Raises:
            EdgeError: the board cannot be reached, or there can be no limits.
            OSError: a program or a limit of ours failed.
        """
        self.restart_at_s, self.started_s = None, now_s
        self.starts += 1
        try:
            self.limits = self.make_limits()
            self._limit()
            groups = self.limits.folders if self.limits else ()
            self.program = self.host.start(settings, folder, groups, log)
        except BaseException:
            self.end_program()
            raise

    def _limit(self) -> None:
        if self.limits is not None:
            self.limits.set_cores(self.cores * self.factor)

    def address(self, where: tuple[str, int]) -> str:
        """Return where its program finds a coordinator that this machine reaches at *where*."""
        port = where[1]
        if self.relay is not None:
            self.used = self.used or self.relay.usage()
            self.relay.aim(*where)
            port = self.relay.port
        return f"tcp://{self.host.address}:{port}"

    def plan_restart(self, code: int | None, now_s: float, restarts: int) -> None:
        """Plan another start if that may help; wait longer each time that it dies soon."""
        if self.starts > restarts or code in (0, *HOPELESS) or self.restart_at_s is not None:
            return
        if now_s - self.started_s > LONGEST_RESTART_S:
            self.wait_s = RESTART_S
        self.restart_at_s = now_s + self.wait_s
        self.wait_s = min(2 * self.wait_s, LONGEST_RESTART_S)

    def end_program(self) -> int | None:
        """End its program, note how it ended, and remove its groups; return the exit code."""
        program, limits, self.program, self.limits = self.program, self.limits, None, None
        if limits is not None:
            self.peak_bytes = max(self.peak_bytes or 0, limits.peak_bytes() or 0)
            self.num_killed += limits.num_killed()
        self.exits.append(None)
        if program is not None:
            program.close()
            self.exits[-1] = program.exit_code
        if limits is not None:
            limits.remove()
        return self.exits[-1]

    def facts(self) -> dict[str, Any]:
        """Return what became of it, for the report."""
        facts: dict[str, Any] = {
            "starts": self.starts,
            "exits": self.exits,
            "peak_group_bytes": self.peak_bytes,
            "killed_for_memory": self.num_killed,
            "power_mode": self.power_mode,
        }
        if self.relay is not None and self.used is not None:
            now, then = self.relay.usage(), self.used
            names = LinkUsage.__dataclass_fields__
            facts["link"] = {name: getattr(now, name) - getattr(then, name) for name in names}
        return facts

    # ---- faults ----

    def switch_off(self, *, quietly: bool) -> None:
        """Kill its program; *quietly*: nobody notices, as when the power fails."""
        try:
            if quietly:
                assert self.relay is not None
                self.relay.cut()
        finally:
            if self.program is not None:
                self.program.signal(signal.SIGKILL)

    def reconnect(self) -> None:
        """End the connections of its former program, and its cuts."""
        if self.relay is not None:
            self.relay.drop()
            self.relay.mend()

    def slow_down(self, factor: float) -> None:
        """Give it *factor* of its speed from now on, also in programs that are started later."""
        self.factor = factor
        with contextlib.suppress(OSError):  # its program has just ended and its groups are gone
            self._limit()

    def change_link(self, config: ExperimentConfig, fault: FaultConfig, *, begins: bool) -> None:
        """Cut its link, or change it to another one, or back to its own."""
        assert self.relay is not None
        board = self.host.config
        if fault.do == "cut":
            self.relay.cut(fault.seconds)
        else:
            link = fault.to if begins else board.link
            self.relay.reshape(link_shape(config, link, board.jitter_ms))
