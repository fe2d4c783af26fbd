"""In which dtype frozen weights lie in memory, and in which matrix products run.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


Compute = Literal["auto", "float32", "bfloat16", "float16"]


Base = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""How frozen weights are kept; what int8 and int4 mean stands in `quantized.py`."""


BaseSetting = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
"""What a config may say of it; `auto` is decided when the device knows its memory and its run."""


# Bytes for each weight of a linear layer, where not 4; those of int8's scales hardly count.
LINEAR_BYTES: Mapping[Base, float] = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "int4": 0.5 + 2 / 32,
}


def base_widths(base: Base) -> tuple[int, float | None]:
    """Return the bytes of a frozen number, and those of a linear weight of a block.

    The second is None where it is as all the others.
    """
    if base in ("bfloat16", "float16"):
        return 2, None
    return 4, LINEAR_BYTES.get(base)


def resolve_compute(compute: Compute, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; `auto` is bfloat16 where the hardware has it."""
    import torch

    if compute != "auto":
        dtype: torch.dtype = getattr(torch, compute)
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def compute_name(compute: Compute, device: torch.device) -> str:
    """Return the name of a dtype of matrix products, as configs have it."""
    return str(resolve_compute(compute, device)).removeprefix("torch.")


@contextmanager
def autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run matrix products in *dtype*; float32 changes nothing."""
    import torch

    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype=dtype):
        yield
