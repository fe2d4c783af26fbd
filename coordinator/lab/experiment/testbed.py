"""Hardware in the loop: methods on real boards, or on emulated ones with real limits.

    run_experiment(config, methods, folder, print, stop)

This file keeps what outlives single runs: keys, relays, and what lies on the boards. One run is
`run.py`, what came out `report.py`.
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
from coordinator.gateway.allow_list import AllowList
from coordinator.lab.experiment.board_host import BoardHost, build_wheel, make_site
from coordinator.lab.experiment.board_run import BoardRun
from coordinator.lab.experiment.cgroup import LEAST_CORES, CgroupLimits
from coordinator.lab.experiment.completed_runs import (
    COMPLETED,
    NOT_RUN,
    is_complete,
    make_room,
    refuse_foreign,
)
from coordinator.lab.experiment.config import (
    ExperimentConfig,
    cores,
    link_shape,
    memory_bytes,
    needs_relay,
)
from coordinator.lab.experiment.namespace import Namespace
from coordinator.lab.experiment.relay import LinkShape, Relay
from coordinator.lab.experiment.run import ExperimentRun
from edge_sdk.config.describe import dump_config
from edge_sdk.errors import ConfigError, DeviceError
from edge_sdk.files import storage_errors
from edge_sdk.transport.keys import create_key_pair
from profiler.sensors.cgroup import allowed_cores

Progress = Callable[[str], None]


def run_experiment(
    config: ExperimentConfig,
    methods: Mapping[str, ExperimentConfig],
    out: Path,
    told: Progress,
    stop: threading.Event,
) -> dict[str, str]:
    """Run every method with every seed; returns how each run ended, by the name of its folder.

    Runs in *out* that are complete already, with the same config and data, are not run again.

    Raises:
        EdgeError: the config is wrong, a board cannot be prepared, or something that is no run of
            an experiment has the name of one in *out*.
    """
    ended = {}
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "experiment.yaml").write_text(dump_config(config), encoding="utf-8")
    wanted = dict(_runs(methods, out))
    missing = {label: run for label, run in wanted.items() if not is_complete(out / label, run)}
    for label in missing:
        refuse_foreign(out / label)
    with Testbed(config, told, stop) if missing else ExitStack() as testbed:
        for label, run in wanted.items():
            if label in missing and isinstance(testbed, Testbed) and not stop.is_set():
                make_room(out / label)
                ended[label] = testbed.run(run, out, label)
            else:
                ended[label] = COMPLETED if label not in missing else NOT_RUN
            told(f"{label}: {ended[label]}")
    return ended


def _runs(
    methods: Mapping[str, ExperimentConfig], out: Path
) -> Iterator[tuple[str, ExperimentConfig]]:
    for method, run in methods.items():
        seeds = run.experiment.seeds or (run.training.seed,)
        for seed in seeds:
            training = replace(run.training, seed=seed)
            label = f"{method}-{seed}" if run.experiment.seeds else method
            yield label, replace(run, training=training, runs=out, name=label)


class Testbed:
    """Boards, relays and keys of one experiment. Use as a context manager: it leaves nothing."""

    def __init__(self, config: ExperimentConfig, told: Progress, stop: threading.Event) -> None:
        self._config, self._told, self._stop = config, told, stop
        self._stack = ExitStack()
        self._id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._sites: dict[str, BoardHost] = {}
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
            self._sites[name] = make_site(self._config, name, self._workspace, self._id)
            if needs_relay(self._config, name):
                relay = self._relays[name] = self._make_relay(name)
                stack.enter_context(relay)
                if isinstance(relay, Namespace):
                    site = self._sites[name]
                    site.address, site.enter = relay.host, relay.enter
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
        """With every link that it is to be: which the kernel has is better known before a run."""
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
        with ThreadPoolExecutor(len(self._sites)) as pool:
            try:
                work = [pool.submit(self._prepare, wheel, site) for site in self._sites.values()]
                wait(work)  # all of them: what one brings after it was cleaned would stay there
                for done in work if not self._stop.is_set() else ():
                    done.result()
                yield
            finally:
                list(pool.map(self._clean, self._sites.values()))

    def _wheel(self, lock: threading.Lock) -> Path:
        with lock:
            found = sorted((self._workspace / "wheel").glob("*.whl"))
            given = self._config.experiment.wheel
            return given or (found[0] if found else build_wheel(self._workspace / "wheel"))

    def _prepare(self, wheel: Callable[[], Path], site: BoardHost) -> None:
        try:
            site.prepare(self._workspace / f"{site.name}.key", wheel, self._stop)
        except (DeviceError, OSError) as error:
            raise DeviceError(f"board {site.name}: {error}") from error
        self._told(f"{site.name}: prepared")

    def _clean(self, site: BoardHost) -> None:
        try:
            site.clean()
        except DeviceError as error:
            self._told(f"{site.name}: {site.home} is still there: {error}")

    # ---- limits ----

    def _can_limit(self) -> bool:
        """Try whether emulated boards can have limits here."""
        if not self._cores:
            return False
        name = min(self._cores, key=lambda board: self._cores[board])
        try:
            limits = self._make_cage(name)
        except DeviceError as error:
            if self._config.experiment.must_limit:
                raise ConfigError(
                    f"boards: {error}; run as root, or set experiment.must_limit=false to go on "
                    "without limits"
                ) from error
            self._told(f"emulated boards are NOT limited in memory and speed: {error}")
            return False
        limits.remove()
        self._warn_of_cores()
        return True

    def _warn_of_cores(self) -> None:
        threads = self._config.experiment.coordinator_threads
        wanted, there = sum(self._cores.values()) + threads, allowed_cores().value
        if there is not None and wanted > there:
            self._told(
                f"emulated boards and coordinator want {wanted:.2f} cores at the same time and "
                f"there are {there:g}: boards may be slower than meant; lower experiment.cores"
            )
        for name, share in self._cores.items():
            if share < LEAST_CORES:
                self._told(f"{name}: {share:.4f} cores are too few, it gets {LEAST_CORES:g}")

    def _make_cage(self, name: str) -> CgroupLimits:
        # Each start has groups of its own: the peak of a program is not that of the one before.
        return CgroupLimits(
            f"edgesplit-{os.getpid()}-{name}-{time.monotonic_ns()}",
            memory_bytes=memory_bytes(self._config, name),
            cores=self._cores[name],
        )

    # ---- runs ----

    def run(self, config: ExperimentConfig, out: Path, label: str) -> str:
        """Run once; returns how it ended."""
        seats = {name: self._seat(name, site) for name, site in self._sites.items()}
        trial = ExperimentRun(
            config,
            self._served(config, out, label),
            seats,
            server_key=self._public,
            workspace=self._workspace,
            told=self._told,
            stop=self._stop,
        )
        return trial.run()

    def _seat(self, name: str, site: BoardHost) -> BoardRun:
        seat = BoardRun(site, self._relays.get(name))
        if name in self._cores and self._is_limited:
            seat.make_limits, seat.cores = partial(self._make_cage, name), self._cores[name]
        if seat.relay is not None:
            board = self._config.boards[name]
            seat.relay.reshape(link_shape(self._config, board.link, board.jitter_ms))
        return seat

    def _served(self, config: ExperimentConfig, out: Path, label: str) -> ServeConfig:
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
