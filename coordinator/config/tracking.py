"""The `tracking` section of a run's configuration: where the numbers of `report_to` go.

What a library reads from its own environment (`WANDB_MODE`, `MLFLOW_TRACKING_URI`) is not repeated
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edge_sdk.transport.addresses import WebAddress, web_address


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where numbers go that `report_to` asks for; see docs/monitoring.md."""

    project: str = "edgesplit"
    """Project of Weights & Biases, experiment of MLflow."""
    mlflow_uri: str | None = None
    """Where MLflow keeps runs, as its `MLFLOW_TRACKING_URI`, which counts where this is None; None
    without it: the folder `mlruns` below `runs`. An address with an `@` anywhere is refused: what
    stands before it may be a password; write `%40` where none does."""
    prometheus_address: str = "127.0.0.1:9464"
    """HOST:PORT of the page `/metrics`; port 0 is any. Anything but this machine's own loopback
    needs `prometheus_token`."""
    prometheus_token: Path | None = None
    """File with a token of at least 16 characters; who reads `/metrics` must then send it, as
    `Authorization: Bearer TOKEN`."""

    def __post_init__(self) -> None:
        if not self.project.strip():
            raise ValueError("project must not be empty")
        if self.mlflow_uri is not None and _may_hold_secret(self.mlflow_uri):
            raise ValueError(
                "mlflow_uri must hold no name and password, as it stands in the run's files: give "
                "them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; an @ of anything "
                "else is written %40"
            )
        _ = self.prometheus_place

    @property
    def prometheus_place(self) -> WebAddress:
        """Where the page `/metrics` is.

        Raises:
            ValueError: `prometheus_address` is no HOST:PORT, or is open to all.
        """
        return web_address(
            "prometheus_address",
            self.prometheus_address,
            has_token=self.prometheus_token is not None,
            token="prometheus_token",
        )


def _may_hold_secret(uri: str) -> bool:
    """Return whether something before an `@` could be a password, whatever stands in that.

    Only a path of this machine may hold an `@`.
    """
    if "@" not in uri:
        return False
    try:
        parts = urlsplit(uri)
    except ValueError:
        return True
    if not parts.scheme:
        return "//" in uri
    return bool(parts.netloc) or parts.scheme not in ("file", "sqlite")
