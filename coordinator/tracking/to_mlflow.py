"""Numbers as a run of MLflow: on its server, or in a folder.

Sent: numbers and how the run is trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.tracking.names import Moment, TrackedRun
from edge_sdk.errors import ConfigError

# Bounds of its interface for one request, and for the text of a parameter.
MOST_METRICS, MOST_PARAMS, MOST_TEXT = 1000, 100, 500


def tracking_uri(config: ServeConfig) -> str:
    """Return where runs are kept."""
    folder = (config.runs / "mlruns").absolute().as_uri()
    return config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or folder


def check_mlflow(config: ServeConfig) -> None:
    """Make sure that there is a store of that kind; no server is asked.

    Raises:
        ConfigError: MLflow has none, or does not write to it any more.
    """
    uri = tracking_uri(config)
    if uri.startswith(("http://", "https://", "databricks")):
        return
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    if _is_folder(uri) and not allowed and _refuses_folders():
        raise ConfigError(
            f"report_to: mlflow would keep its runs in {uri}, which it does only with "
            "MLFLOW_ALLOW_FILE_STORE=true in the environment; or give tracking.mlflow_uri=URL"
        )


def _is_folder(uri: str) -> bool:
    return uri.startswith("file:") or "://" not in uri


def _refuses_folders() -> bool:
    """Return whether this release writes to a folder only when it is told to."""
    _quiet()
    from mlflow import environment_variables

    return hasattr(environment_variables, "MLFLOW_ALLOW_FILE_STORE")


class MlflowRun:
    """Logs to one run of MLflow, also when ours is resumed."""

    takes_live = False

    def open(self, about: TrackedRun) -> str:
        """Begin a run, or go on with the one of that id."""
        _quiet()
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric: Any = Metric
        self._client = MlflowClient(tracking_uri(about.config))
        if about.ident is not None:
            self._id = about.ident
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        project = about.config.tracking.project
        found = self._client.get_experiment_by_name(project)
        where = found.experiment_id if found else self._client.create_experiment(project)
        self._id = self._client.create_run(where, run_name=about.name).info.run_id
        params = [Param(key, str(value)[:MOST_TEXT]) for key, value in about.facts.items()]
        for some in _in_parts(params, MOST_PARAMS):
            self._client.log_batch(self._id, params=some)
        return self._id

    def take(self, samples: Sequence[Moment]) -> None:
        """Log the numbers; a device's stand below its name."""
        metrics = [
            self._metric(
                name if device is None else f"device/{device}/{name}",
                float(value),
                round(1000 * sample.time_s),
                sample.step,
            )
            for sample in samples
            for name, value, device in sample.numbers
        ]
        for some in _in_parts(metrics, MOST_METRICS):
            self._client.log_batch(self._id, metrics=some)

    def close(self, *, completed: bool) -> None:
        """End the run; one that is not completed goes on under its id."""
        self._client.set_terminated(self._id, "FINISHED" if completed else "KILLED")

    def abandon(self) -> None:
        """Do nothing: none of its threads keeps a program."""


def _in_parts(values: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(values), most):
        yield values[begin : begin + most]


def _quiet() -> None:
    """Keep the library from telling its makers that it is used."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
