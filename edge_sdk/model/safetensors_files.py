"""Tensors of safetensors files, mapped into memory and read when asked for.

Knows neither models nor parts.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from edge_sdk.errors import ModelError, one_line
from profiler.sensors.memory import drop_mapped

if TYPE_CHECKING:
    import torch


# Looking for the mapping takes a millisecond: small tensors stay where they are.
LEAST_DROPPED = 1 << 20


class _Mapped(Mapping[str, "torch.Tensor"]):
    """Tensors of safetensors files, read when asked for."""

    def __init__(self, files: dict[str, Any], paths: dict[str, Path]) -> None:
        """Remember for each tensor its open file, or else the path to open for it alone."""
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


class Sink(Protocol):
    """Takes bytes, as a file or a hash does."""

    def write(self, data: Any, /) -> object:
        """Take *data*."""


def write_tensors(
    tensors: Mapping[str, torch.Tensor], sink: Sink, metadata: Mapping[str, str] | None = None
) -> None:
    """Write *tensors* as `safetensors.torch.save` does, to the bit, but one after the other.

    Each is asked for twice, as the file begins with all their dtypes and shapes. Pages of mapped
    files are let go of once they are written.
    """
    import torch
    from safetensors.torch import save

    dtypes: dict[str, torch.dtype] = {}
    shapes: dict[str, torch.Size] = {}
    for name in tensors:
        tensor = tensors[name]
        dtypes[name], shapes[name] = tensor.dtype, tensor.shape
    # The library decides what stands in which order, and what dtypes are called.
    nothing = {name: torch.empty(0, dtype=dtype) for name, dtype in dtypes.items()}
    header: dict[str, Any] = json.loads(
        save(nothing, None if metadata is None else {**metadata})[8:]
    )
    about = {key: header.pop(key) for key in ("__metadata__",) if key in header}
    stop = 0
    for name, entry in header.items():
        begin, stop = stop, stop + math.prod(shapes[name]) * dtypes[name].itemsize
        entry["shape"], entry["data_offsets"] = list(shapes[name]), [begin, stop]
    text = json.dumps({**about, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in header:
        if math.prod(shapes[name]):
            tensor = tensors[name]
            sink.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            drop_pages(tensor)


def drop_pages(tensor: torch.Tensor) -> None:
    """Let go of the pages of a large tensor that lies in a mapped file and was only read."""
    if tensor.device.type == "cpu" and tensor.nbytes >= LEAST_DROPPED and tensor.is_contiguous():
        drop_mapped(tensor.data_ptr(), tensor.nbytes)


# As safetensors calls them; bfloat16 is kept as the bits that it is.
DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# As the safetensors library itself limits it.
MAX_HEADER_BYTES = 100_000_000


class Stored(NamedTuple):
    """One tensor of a part."""

    array: np.ndarray
    """Read-only, backed by the file."""
    dtype: str
    """A key of `DTYPES`."""

    def float32(self) -> np.ndarray:
        """Return a copy in float32."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)


def map_part(path: Path) -> dict[str, Stored]:
    """Return the tensors of a part file by whole-model name.

    Raises:
        ModelError: the file is no safetensors file, or of a dtype that is not known here.
    """
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(whole[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(whole[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _stored(whole, 8 + length, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no part of a model: {one_line(error)}") from error


def _stored(whole: mmap.mmap, first: int, entry: dict[str, Any]) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    kind = np.dtype(DTYPES[dtype])
    count = math.prod(shape)
    if count * kind.itemsize != end - begin:
        raise ValueError(f"{end - begin} bytes for {shape} of {dtype}")
    array = np.frombuffer(whole, kind, count, first + begin) if count else np.empty(0, kind)
    return Stored(array.reshape(shape), str(dtype))
