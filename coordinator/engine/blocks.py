"""Parts of a model as the coordinator holds them: on its device and in its base.

Each tensor goes from the memory-mapped file straight to its device and dtype, or into the codes
that stand for it; there is no second copy of any part. Knows no network and no rounds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from coordinator.config.run import ServeConfig
from edge_sdk.model.partition import Slice
from edge_sdk.model.precision import resolve_compute
from edge_sdk.model.quantized import Quantized, resolve_base
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.torch_runtime import pick_device


def load_slice(config: ServeConfig, source: ModelSource, parts: Iterable[str]) -> Slice:
    """Return a slice with *parts* of a model, on the device and in the base of a run."""
    device = pick_device(config.device)
    dtype, quantized = base_of(config)
    slice_ = Slice(source.config, config.task, source.layout, dtype, device, quantized)
    for name in parts:
        slice_.add(name, source.tensors(name))
    return slice_


def base_of(config: ServeConfig) -> tuple[torch.dtype, Quantized | None]:
    """Return the dtype of what the coordinator does not quantise, and the form of what it does.

    Raises:
        ConfigError: products in the run's `compute` cannot be had from such weights.
    """
    return resolve_base(config.base, resolve_compute(config.compute, pick_device(config.device)))
