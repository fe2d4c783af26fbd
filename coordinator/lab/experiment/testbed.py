"""Hardware in the loop: methods on real boards, or on emulated ones with real limits.

    run_experiment(config, methods, folder, print, stop)

This file holds what outlives single runs: keys, relays, and what lies on the boards. One run is in
`run.py`, its results are in `report.py`.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.lab.comparison.run_count import RunCount, tell_nobody
from coordinator.lab.experiment.board_host import BoardHost, make_host
from coordinator.lab.experiment.board_run import BoardRun
from coordinator.lab.experiment.cgroup import LEAST_CORES, CgroupLimits
from coordinator.lab.experiment.completed_runs import (
    COMPLETED,
    NOT_RUN,
    is_complete,
    make_room,
    refuse_foreign,
    seconds_of,
)
from coordinator.lab.experiment.config import (
    ExperimentConfig,
    cores,
    link_shape,
    memory_bytes,
    needs_relay,
)
from coordinator.lab.experiment.namespace import Namespace
from coordinator.lab.experiment.planned_runs import PlannedRun, planned_runs
from coordinator.lab.experiment.relay import LinkShape, Relay
from coordinator.lab.experiment.run import ExperimentRun
from coordinator.remote.wheel import build_wheel
from edge_sdk.config.describe import dump_config
from edge_sdk.errors import ConfigError, DeviceError
from edge_sdk.files import storage_errors
from edge_sdk.transport.keys import create_key_pair
from profiler.sensors.cgroup import allowed_cores

Progress = Callable[[str], None]
NO_WHEEL = "set experiment.wheel to a wheel, or boards.NAME.python to an environment that has it"


def run_experiment(
    config: ExperimentConfig,
    methods: Mapping[str, ExperimentConfig],
    out: Path,
    progress: Progress,
    stop: threading.Event,
) -> dict[str, str]:
    """Run every method with every seed; return how each run ended, by the name of its folder.

    Runs in *out* that are complete already, with the same config and data, are not run again.

    Raises:
        EdgeError: the config is wrong, a board cannot be prepared, or something in *out* has the
            name of a run and is none.
    """
    ended: dict[str, str] = {}
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "experiment.yaml").write_text(dump_config(config), encoding="utf-8")
    wanted = planned_runs(methods, out)
    missing = {run.label for run in wanted if not is_complete(out / run.label, run.config)}
    for label in sorted(missing):
        refuse_foreign(out / label)
    # Those that are there come first, so that what is left is told from what they took.
    wanted = sorted(wanted, key=lambda run: run.label in missing)
    count = RunCount([run.method for run in wanted], progress, tell_nobody, time.monotonic)
    with Testbed(config, progress, stop) if missing else ExitStack() as testbed:
        for run in wanted:
            if run.label not in missing:
                count.kept(seconds_of(out / run.label))
                ended[run.label] = COMPLETED
            elif isinstance(testbed, Testbed) and not stop.is_set():
                make_room(out / run.label)
                count.begin(run.label)
                progress(f"run {count.done + 1} of {count.total}: {run.label} begins")
                ended[run.label] = testbed.run(run, out)
                count.end(ended[run.label])
            else:
                ended[run.label] = NOT_RUN
                progress(f"{run.label}: {NOT_RUN}")
    count.tell_kept()
    return {run.label: ended[run.label] for run in planned_runs(methods, out)}


class Testbed:
    """Boards, relays and keys of one experiment. A context manager, which leaves nothing behind."""

    def __init__(self, config: ExperimentConfig, progress: Progress, stop: threading.Event) -> None:
        self._config, self._progress, self._stop = config, progress, stop
        self._stack = ExitStack()
        self._id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._hosts: dict[str, BoardHost] = {}
        self._relays: dict[str, Relay | Namespace] = {}
        self._cores = cores(config)
        self._is_limited = False

    def __enter__(self) -> Testbed:
        with ExitStack() as stack:
            self._set_up(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set_up(self, stack: ExitStack) -> None:
        # Holds secret keys: mode 0700, not where results are kept.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgesplit-"))
        self._workspace = Path(temporary)
        self._is_limited = self._can_limit()
        self._public = create_key_pair(self._workspace / "coordinator.key").public
        allowed = AllowList(self._workspace / "devices.yaml")
        for name in self._config.boards:
            pair = create_key_pair(self._workspace / f"{name}.key")
            allowed.register(name, pair.public)
            self._hosts[name] = make_host(self._config, name, self._workspace, self._id)
            if needs_relay(self._config, name):
                relay = self._relays[name] = self._make_relay(name)
                stack.enter_context(relay)
                if isinstance(relay, Namespace):
                    host = self._hosts[name]
                    host.address, host.enter = relay.host, relay.enter
        stack.enter_context(self._prepared())

    def _make_relay(self, name: str) -> Relay | Namespace:
        board = self._config.boards[name]
        shape = link_shape(self._config, board.link, board.jitter_ms)
        if self._config.experiment.network == "namespaces" and board.ssh is None:
            try:
                return self._make_namespace(name, shape)
            except DeviceError as error:
                raise ConfigError(
                    f"experiment.network: no namespace for {name}: {error}; or use relay, which "
                    "needs no rights"
                ) from error
        return Relay(shape, host="127.0.0.1" if board.ssh is None else "")

    def _make_namespace(self, name: str, shape: LinkShape) -> Namespace:
        """Make a namespace; try each link that it will be, in case the kernel cannot make one."""
        jitter_ms = self._config.boards[name].jitter_ms
        later = [f.to for f in self._config.faults if f.board == name and f.to is not None]
        namespace = Namespace(len(self._relays), shape)
        try:
            for link in later:
                namespace.reshape(link_shape(self._config, link, jitter_ms))
        except DeviceError:
            namespace.close()
            raise
        return namespace

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Bring everything to all boards at the same time, and remove it in the end."""
        wheel = cache(partial(self._wheel, threading.Lock()))
        with ThreadPoolExecutor(len(self._hosts)) as pool:
            try:
                work = [pool.submit(self._prepare, wheel, host) for host in self._hosts.values()]
                wait(work)  # for all of them: what one brings after the clean-up would stay there
                for done in work if not self._stop.is_set() else ():
                    done.result()
                yield
            finally:
                list(pool.map(self._clean, self._hosts.values()))

    def _wheel(self, lock: threading.Lock) -> Path:
        with lock:
            built = sorted((self._workspace / "wheel").glob("*.whl"))
            given = self._config.experiment.wheel
            return given or (
                built[0] if built else build_wheel(self._workspace / "wheel", NO_WHEEL)
            )

    def _prepare(self, wheel: Callable[[], Path], host: BoardHost) -> None:
        try:
            host.prepare(self._workspace / f"{host.name}.key", wheel, self._stop)
        except (DeviceError, OSError) as error:
            raise DeviceError(f"board {host.name}: {error}") from error
        self._progress(f"{host.name}: prepared")

    def _clean(self, host: BoardHost) -> None:
        try:
            host.clean()
        except DeviceError as error:
            self._progress(f"{host.name}: {host.home} is still there: {error}")

    # ---- limits ----

    def _can_limit(self) -> bool:
        """Return whether emulated boards can have limits here."""
        if not self._cores:
            return False
        name = min(self._cores, key=lambda board: self._cores[board])
        try:
            limits = self._make_limits(name, self._cores[name])
        except DeviceError as error:
            if self._config.experiment.must_limit:
                raise ConfigError(
                    f"boards: {error}; run as root, or set experiment.must_limit=false to go on "
                    "without limits"
                ) from error
            self._progress(f"emulated boards are NOT limited in memory and speed: {error}")
            return False
        limits.remove()
        self._warn_of_cores()
        return True

    def _warn_of_cores(self) -> None:
        threads = self._config.experiment.coordinator_threads
        wanted, there = sum(self._cores.values()) + threads, allowed_cores().value
        if there is not None and wanted > there:
            self._progress(
                f"emulated boards and coordinator want {wanted:.2f} cores at the same time and "
                f"there are {there:g}: boards may be slower than meant; lower experiment.cores"
            )
        for name, share in self._cores.items():
            if share < LEAST_CORES:
                self._progress(f"{name}: {share:.4f} cores are too few, it gets {LEAST_CORES:g}")

    def _make_limits(self, name: str, quota: float) -> CgroupLimits:
        # Each start has groups of its own: the peak of a program is not that of the one before.
        return CgroupLimits(
            f"edgesplit-{os.getpid()}-{name}-{time.monotonic_ns()}",
            memory_bytes=memory_bytes(self._config, name),
            cores=quota,
        )

    # ---- runs ----

    def run(self, planned: PlannedRun, out: Path) -> str:
        """Run what is planned once; return how it ended.

        Raises:
            DeviceError: a board cannot be brought into the run's power mode.
        """
        config = planned.config
        boards = {name: self._board_run(planned, host) for name, host in self._hosts.items()}
        run = ExperimentRun(
            config,
            self._serve_config(config, out, planned.label),
            boards,
            server_key=self._public,
            workspace=self._workspace,
            progress=self._progress,
            stop=self._stop,
        )
        return run.run()

    def _board_run(self, planned: PlannedRun, host: BoardHost) -> BoardRun:
        name = host.name
        board_run = BoardRun(host, self._relays.get(name))
        board_run.power_mode = host.enter_power_mode(planned.mode) or planned.mode
        if name in self._cores and self._is_limited:
            board_run.cores = cores(planned.config)[name]
            board_run.make_limits = partial(self._make_limits, name, board_run.cores)
        if board_run.relay is not None:
            board = self._config.boards[name]
            board_run.relay.reshape(link_shape(self._config, board.link, board.jitter_ms))
        return board_run

    def _serve_config(self, config: ExperimentConfig, out: Path, label: str) -> ServeConfig:
        needs_door = any(board.ssh is not None for board in config.boards.values())
        alone = "tcp://*:*" if config.experiment.network == "namespaces" else "tcp://127.0.0.1:*"
        return replace(
            config.serve_config(),
            listen=config.listen if needs_door else alone,
            secret_key=self._workspace / "coordinator.key",
            allow_list=self._workspace / "devices.yaml",
            runs=out,
            name=label,
        )
