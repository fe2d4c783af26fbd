"""EdgeSplit's client: fine-tune the first blocks of a model on a device that owns its data.

What is named here is the API; everything else may change. Nothing here loads torch, and a name is
loaded when it is first used: an app pays for what it takes.
"""

from typing import TYPE_CHECKING

from profiler.door import lazy_door

if TYPE_CHECKING:
    from edge_sdk.client.callbacks import Callback, RoundBegun, RoundSummary
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
    "RoundBegun",
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
    "RoundBegun": "client.callbacks",
    "RoundSummary": "client.callbacks",
    "StepReport": "protocol.messages",
}

__getattr__, __dir__ = lazy_door(__name__, _HOMES)
