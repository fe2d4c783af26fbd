"""The door to Ray: a cluster that is joined or started, room on it, actors and their answers.

A cluster that is started here is reached from this machine alone, asks for a token that only its
own processes have, tells nobody that it is used, and has no dashboard.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from coordinator.config.engine import EngineConfig
from coordinator.engine.ray.replica_group import StageLost
from edge_sdk.errors import ConfigError, EdgeError, one_line

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

# Seconds for room that others hold at the moment; and, when an actor or a node is gone, for
# another process to take its place.
ROOM_S, RESTART_S = 30.0, 300.0
AGAIN_S = 0.5
# The cluster of this machine: no usage reports, everything on the loopback interface (a switch that
# Ray has for systems whose firewall asks at each start), one token for each start, patience with a
# machine that is busy, and actors that compute with this process's priority, as it would itself.
LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_worker_niceness": "0",
}
CPU, GPU = "CPU", "GPU"


class RayCluster:
    """A Ray cluster, from the start of a run to its end.

    Raises:
        ConfigError: Ray is not installed, no cluster is there, or it has too little.
    """

    def __init__(self, config: EngineConfig, device: str) -> None:
        """Join or start the cluster of *config*, for a run that computes on *device*."""
        self._config = config
        self._owns = _connect(config)
        self._placement: Any = None
        self._actors: list[Any] = []
        self.needs = self._needs(device)
        """What one actor needs."""
        try:
            self._check()
        except ConfigError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of actors and room; a cluster that was started here ends."""
        import ray

        self.dismiss()
        if self._owns:
            ray.shutdown()
            self._owns = False

    # ---- room ----

    @property
    def device(self) -> str:
        """Where an actor computes."""
        return "cuda" if self.needs[GPU] else "cpu"

    def _needs(self, device: str) -> dict[str, float]:
        gpus = self._config.gpus_per_actor
        if gpus is None:
            has_any = any(GPU in node for node in _nodes())
            gpus = 1.0 if has_any and device != "cpu" else 0.0
        return {CPU: self._config.cpus_per_actor, GPU: gpus}

    def _check(self) -> None:
        """Refuse what the cluster will never have room for."""
        wanted = self._config.num_actors
        needs = {kind: amount for kind, amount in self.needs.items() if amount}
        nodes = _nodes()
        room = sum(
            min(math.floor(node.get(kind, 0.0) / amount + 1e-6) for kind, amount in needs.items())
            for node in nodes
        )
        if room < wanted:
            has = " + ".join(_amounts(node) for node in nodes)
            place = self._config.address or "this machine"
            raise ConfigError(
                f"engine: {wanted} actors ({self._config.stages} stages x {self._config.replicas} "
                f"replicas) of {_amounts(needs)} each; {place} has {has}, room for {room}"
            )

    def actors(self, kind: type, works: Sequence[Any]) -> list[Any]:
        """Return an actor of class *kind* for each of *works*; it is made again where it dies.

        Raises:
            ConfigError: others hold the room.
        """
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = {name: amount for name, amount in self.needs.items() if amount}
        self._placement = placement_group([needs] * len(works), strategy="PACK")
        if not self._placement.wait(ROOM_S):
            free: Mapping[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            self.dismiss()
            raise ConfigError(
                f"engine: {len(works)} actors of {_amounts(needs)} each; others use the cluster, "
                f"and {_amounts(free)} of it are free"
            )
        make: Any = ray.remote(kind)
        self._actors = [
            make.options(
                num_cpus=self.needs[CPU],
                num_gpus=self.needs[GPU],
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=index
                ),
            ).remote(work)
            for index, work in enumerate(works)
        ]
        return self._actors

    def dismiss(self) -> None:
        """Let go of actors and of their room."""
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        actors, self._actors = self._actors, []
        placement, self._placement = self._placement, None
        if not ray.is_initialized():
            return
        try:
            for actor in actors:
                ray.kill(actor)
            if placement is not None:
                remove_placement_group(placement)
        except RayError as error:
            log.warning("ray.dismiss error=%s", one_line(error))

    # ---- calls ----

    def host_of(self, actor: Any) -> Any:
        """Return a reference to the address of the node that an actor runs on."""
        return actor.__ray_call__.remote(_host)

    def results(self, references: Sequence[Any]) -> list[Any]:
        """Return what calls have brought; of those that fail, the first error that there is.

        Raises:
            StageLost: an actor, or what it has returned, is gone.
        """
        import ray

        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            for reference in done:
                self.result(reference)
        return [self.result(reference) for reference in references]

    def result(self, reference: Any) -> Any:
        """Return what a call has brought; see `results`."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RayError) or not isinstance(cause, Exception):
                raise StageLost(one_line(error)) from error
            raise cause from error
        except RayError as error:
            raise StageLost(one_line(error).partition(" The actor ")[0]) from error

    def fetch(self, references: Sequence[Any]) -> None:
        """Begin to bring to this machine what calls will return."""
        import ray

        ray.wait(list(references), num_returns=len(references), timeout=0)

    def each(self, name: str) -> list[Any]:
        """Call method *name* of every actor, however often it has to be begun anew for that.

        Raises:
            EdgeError: one of them does not come back.
        """
        until_s, found = time.monotonic() + RESTART_S, dict[int, Any]()
        while len(found) < len(self._actors):
            rest = [i for i in range(len(self._actors)) if i not in found]
            calls = {i: getattr(self._actors[i], name).remote() for i in rest}
            for i, reference in calls.items():
                try:
                    found[i] = self._within(reference, until_s - time.monotonic())
                except StageLost as error:
                    if time.monotonic() > until_s:
                        raise EdgeError(
                            f"engine: an actor is gone, and none could take its place within "
                            f"{RESTART_S:g} s: {error}; the cluster has "
                            f"{' + '.join(map(_amounts, _nodes()))}"
                        ) from error
                    time.sleep(AGAIN_S)
        return [found[i] for i in range(len(self._actors))]

    def _within(self, reference: Any, seconds: float) -> Any:
        import ray

        done, _ = ray.wait([reference], timeout=max(0.0, seconds))
        if not done:
            raise StageLost("no answer")
        return self.result(reference)


def _connect(config: EngineConfig) -> bool:
    """Join or start a cluster, unless this process is in one; return whether it was started."""
    if config.address is None:
        prepare_local()
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine.kind: 'ray' needs Ray: pip install 'edgesplit[ray]'") from error
    if ray.is_initialized():
        return False
    settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if config.address is None:
        settings |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=config.address or "local", **settings)
    except Exception as error:  # noqa: BLE001 - Ray raises a wide family of errors here
        place = config.address or "this machine"
        raise ConfigError(
            f"engine.address: no Ray cluster at {place}: {one_line(error)}"
        ) from error
    return True


def prepare_local() -> None:
    """Set what Ray reads for a cluster of this machine: once, when it is imported."""
    if "ray" in sys.modules:
        return
    for name, value in LOCAL.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _nodes() -> list[Mapping[str, float]]:
    """Return what each node of the cluster has."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _amounts(resources: Mapping[str, float]) -> str:
    """Return `2 CPUs and 1 GPU`."""
    named = [(kind, resources.get(kind, 0.0)) for kind in (CPU, GPU)]
    told = [f"{n:g} {kind}{'s' * (n != 1)}" for kind, n in named if n or kind == CPU]
    return " and ".join(told)


def _host(_actor: object) -> str:
    """Return the address of the node that this process is on."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
