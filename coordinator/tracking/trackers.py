"""Which trackers there are, what each needs, and whether that is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

from coordinator.config.run import ServeConfig
from coordinator.tracking.names import Tracker
from coordinator.tracking.to_csv import CsvTable
from coordinator.tracking.to_mlflow import MlflowRun, check_mlflow
from coordinator.tracking.to_prometheus import PrometheusPage, check_token
from coordinator.tracking.to_tensorboard import TensorBoardFiles
from coordinator.tracking.to_wandb import WandbRun, check_wandb
from edge_sdk.errors import ConfigError


def _nothing(_: ServeConfig) -> None:
    """Check nothing: the library is all that is needed."""


class TrackerKind(NamedTuple):
    """A kind of tracker."""

    make: Callable[[], Tracker]
    package: str | None
    """What is imported for it."""
    check: Callable[[ServeConfig], None]
    """Raises ConfigError where it could not work; asks nobody else and changes nothing."""


KINDS = {
    "tensorboard": TrackerKind(TensorBoardFiles, "tensorboard", _nothing),
    "wandb": TrackerKind(WandbRun, "wandb", check_wandb),
    "mlflow": TrackerKind(MlflowRun, "mlflow", check_mlflow),
    "prometheus": TrackerKind(PrometheusPage, "prometheus_client", check_token),
    "csv": TrackerKind(CsvTable, None, _nothing),
}
"""By name in `report_to`; the name is also that of the extra."""


def check_trackers(config: ServeConfig) -> Iterator[str]:
    """Yield the name of each tracker of a run, once it is known to have what it needs.

    Raises:
        ConfigError: one of them has not.
    """
    for name in config.report_to:
        kind = KINDS[name]
        if kind.package is not None and find_spec(kind.package) is None:
            raise ConfigError(
                f"report_to: {name} needs {kind.package}, which is missing: "
                f"pip install 'edgesplit[{name}]'"
            )
        kind.check(config)
        yield name


def require_trackers(config: ServeConfig) -> None:
    """Fail before anybody is greeted where a tracker of a run lacks what it needs.

    Raises:
        ConfigError: it does.
    """
    for _ in check_trackers(config):
        pass
