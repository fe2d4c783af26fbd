"""States are those of the split model, and read as the other side reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.lab.privacy.config import CODECS
from coordinator.lab.privacy.states import Walk, as_received, error_of, windows
from tests.coordinator.lab.privacy.samples import random_texts, slice_of
from tests.tiny import BLOCKS


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_walk_is_what_a_device_computes(family: str) -> None:
    """From split to split come the hidden states that the front of the model has there."""
    model, texts = slice_of(family), random_texts(0, classes=family == "bert")
    walk = Walk(model, texts.batches)

    for split in range(1, BLOCKS + 1):
        walk.to(split)

        for state, batch in zip(walk.states, texts.batches, strict=True):
            with torch.no_grad():
                whole = model.front(
                    torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths), split
                )
            is_real = np.arange(state.shape[1]) < batch.lengths[:, None]
            np.testing.assert_allclose(state[is_real], whole.numpy()[is_real], rtol=1e-4, atol=1e-4)


def test_every_codec_is_read_as_on_the_wire() -> None:
    """float32 is exact, and each further codec loses no less than the one before."""
    model, texts = slice_of("llama"), random_texts(0)
    walk = Walk(model, texts.batches)
    walk.to(2)

    errors = {
        codec: error_of(walk.states, as_received(walk.states, texts.batches, codec), texts)
        for codec in CODECS
    }

    assert CODECS[0] == "float32"
    assert errors["float32"] == 0.0
    plain = [errors[name] for name in ("float32", "bfloat16", "int8", "int4", "int3", "int2")]
    assert plain == sorted(plain)
    assert 0.0 < errors["residual"] < errors["int2"]


def test_windows_hold_the_neighbours() -> None:
    """A token's state stands between those before and behind it, zeros where the text ends."""
    model, texts = slice_of("llama"), random_texts(0)
    states = Walk(model, texts.batches).states
    width = states[0].shape[2]

    seen = windows(states, texts)

    own = texts.flat(states)
    np.testing.assert_array_equal(seen[:, width : 2 * width], own)
    first = texts.place_N == 0
    assert not seen[first, :width].any()
    np.testing.assert_array_equal(seen[1:, :width][~first[1:]], own[:-1][~first[1:]])
    np.testing.assert_array_equal(seen[:-1, 2 * width :][~first[1:]], own[1:][~first[1:]])
    last = np.append(first[1:], True)
    assert not seen[last, 2 * width :].any()
