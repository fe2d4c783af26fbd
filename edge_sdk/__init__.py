"""EdgeSplit's client: fine-tune the first blocks of a model on a device that owns its data.

What is named here is the API; everything else may change. Nothing here loads torch, and a name is
loaded when it is first used: an app pays for what it takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.client.callbacks import Callback, RoundSummary
    from edge_sdk.client.client import EdgeClient
    from edge_sdk.client.config import ClientConfig
    from edge_sdk.config.loader import load_config
    from edge_sdk.data.rows import DataConfig
    from edge_sdk.errors import EdgeError
    from edge_sdk.protocol.messages import StepReport
    from edge_sdk.protocol.plan import Plan

__all__ = [
    "Callback",
    "ClientConfig",
    "DataConfig",
    "EdgeClient",
    "EdgeError",
    "load_config",
    "Plan",
    "RoundSummary",
    "StepReport",
]

_HOMES = {
    "Callback": "client.callbacks",
    "ClientConfig": "client.config",
    "DataConfig": "data.rows",
    "EdgeClient": "client.client",
    "EdgeError": "errors",
    "load_config": "config.loader",
    "Plan": "protocol.plan",
    "RoundSummary": "client.callbacks",
    "StepReport": "protocol.messages",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found without us from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
