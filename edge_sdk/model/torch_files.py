"""Tensors of files that `torch.save` has written, such as pytorch_model.bin.

Such a file is a program that makes objects. torch runs only what makes tensors of it, and refuses
all else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch


def open_torch_files(paths: list[Path]) -> Mapping[str, torch.Tensor]:
    """Return the tensors of all *paths*, by name, mapped into memory.

    Files of torch before 1.6, which cannot be mapped, are read.

    Raises:
        ModelError: a file cannot be read, or holds something else than tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors |= _open_file(path)
    return tensors


def _open_file(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        is_mapped = zipfile.is_zipfile(path)
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        if "Weights only load failed" in str(error):
            raise ModelError(
                f"{path} cannot be read: it is damaged, or holds something else than tensors, "
                "which is not run; take the model as safetensors"
            ) from error
        raise ModelError(f"{path} cannot be read: {one_line(error)[:200]}") from error
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds no tensors by name, but a {type(held).__name__}")
    return {str(name): value for name, value in held.items() if isinstance(value, torch.Tensor)}
