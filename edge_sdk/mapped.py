"""Tensors of safetensors files, mapped into memory and read when asked for.

Knows neither models nor parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import ModelError

if TYPE_CHECKING:
    import torch


class _Mapped(Mapping[str, "torch.Tensor"]):
    """Tensors of safetensors files, read when asked for."""

    def __init__(self, files: dict[str, Any], paths: dict[str, Path]) -> None:
        """Take by tensor its file, open, or else the path to open for this tensor alone."""
        self._files, self._paths = files, paths

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name] if name in self._files else _open_file(self._paths[name])
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class Some(Mapping[str, "torch.Tensor"]):
    """Some of the tensors of another mapping."""

    def __init__(self, state: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> None:
        self._state, self._names = state, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_files(paths: list[Path], is_streamed: bool) -> Mapping[str, torch.Tensor]:
    """Return the tensors of all *paths*, by name.

    Args:
        paths: safetensors files.
        is_streamed: Map a file anew for each tensor, whose pages go when the tensor goes. For who
            reads one after the other and keeps few: addresses are scarce on some boards.

    Raises:
        ModelError: a file cannot be read.
    """
    files: dict[str, Any] = {}
    places: dict[str, Path] = {}
    for path in paths:
        handle = _open_file(path)
        files |= dict.fromkeys(handle.keys(), handle)
        places |= dict.fromkeys(handle.keys(), path)
    return _Mapped({} if is_streamed else files, places)


def _open_file(path: Path) -> Any:  # noqa: ANN401 - safetensors has no types
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
