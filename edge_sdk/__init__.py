"""EdgeSplit's client: fine-tune the first blocks of a model on a device that owns its data.

What is named here is the API; everything else may change. Nothing here loads torch.
"""

from edge_sdk.callbacks import Callback, RoundSummary
from edge_sdk.client import EdgeClient
from edge_sdk.client_config import ClientConfig
from edge_sdk.config import load_config
from edge_sdk.data import DataConfig
from edge_sdk.errors import EdgeError
from edge_sdk.messages import StepReport
from edge_sdk.plan import Plan

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
