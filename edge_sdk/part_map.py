"""The tensors of a part file where they lie on disk: mapped into memory, never copied.

As `weights.open_part`, without torch: what numpy has no dtype for keeps its bytes and its name.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_sdk.errors import ModelError, one_line

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
        """A copy in float32."""
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
