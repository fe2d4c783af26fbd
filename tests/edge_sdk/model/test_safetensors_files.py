"""Parts are mapped as they were stored, and graphs survive the journey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edge_sdk.errors import ModelError
from edge_sdk.model.safetensors_files import DTYPES, map_part
from edge_sdk.runtime.onnx_graphs import read_graphs

TENSORS = {
    "F64": torch.rand(2, 3, dtype=torch.float64),
    "F32": torch.rand(4, 1),
    "F16": torch.rand(3).half(),
    "BF16": torch.rand(5, 2).bfloat16(),
    "I64": torch.arange(6),
    "I32": torch.arange(6, dtype=torch.int32),
    "I8": torch.arange(6, dtype=torch.int8),
    "U8": torch.arange(6, dtype=torch.uint8),
    "BOOL": torch.tensor([True, False]),
}


def test_every_dtype_is_read_as_it_lies_there(tmp_path: Path) -> None:
    """Names, shapes and values are those of the safetensors library; nothing can be written."""
    path = tmp_path / "part.safetensors"
    save_file({**TENSORS, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2)}, path)

    found = map_part(path)

    assert TENSORS.keys() == DTYPES.keys()
    assert found.keys() == TENSORS.keys() | {"scalar", "empty"}
    assert found["scalar"].array == 3.0
    assert found["empty"].array.shape == (0, 2)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == name
        np.testing.assert_array_equal(found[name].float32(), tensor.float().numpy())
        assert not found[name].array.flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"no",
        (60).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(60),
        (60).to_bytes(8, "little")
        + b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}'.ljust(60),
    ],
)
def test_a_file_that_is_no_part_is_refused(tmp_path: Path, data: bytes) -> None:
    """One line with the file's name, whatever is wrong with it."""
    path = tmp_path / "part.safetensors"
    path.write_bytes(data)

    with pytest.raises(ModelError, match=r"part.safetensors is no part of a model"):
        map_part(path)


def test_another_part_holds_no_graphs(tmp_path: Path) -> None:
    """A part without the description is refused in one line."""
    path = tmp_path / "part.safetensors"
    save_file(TENSORS, path)

    with pytest.raises(ModelError, match="holds no graphs"):
        read_graphs(path)
