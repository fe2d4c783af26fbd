"""States of frozen blocks are kept to the bit, within a bound, and no longer than they hold."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.gateway.replays import Replays, StateFile
from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.lora.factors import Array
from edge_sdk.protocol import codecs
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Activation, RoundStart, Stamp
from edge_sdk.protocol.plan import Plan

WIDTH = 8
FROZEN = Plan(split=2, ranks={"w": 0}, alphas={"w": 1.0}, batch_size=2, micro_batch=2)


def state(length: int, seed: int = 0) -> Array:
    """A hidden state."""
    return np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(np.float32)


def activation(
    samples: tuple[int, ...], replays: tuple[int, ...] = (), step: int = 0, device: str = "a"
) -> Activation:
    """The message of a micro-batch."""
    stamp = Stamp(device=device, step=step)
    return Activation(
        stamp=stamp, micro=0, num_micro=1, num_targets=4, samples=samples, replays=replays
    )


def tensors(lengths: tuple[int, ...], *states: Array) -> dict[str, Array]:
    """What comes with it."""
    found: dict[str, Array] = {"lengths": np.array(lengths, np.int32)}
    if states:
        longest = max(lengths)
        rows = [np.pad(s, ((0, longest - len(s)), (0, 0)), constant_values=9.0) for s in states]
        found["hidden"] = np.stack(rows)
    return found


def begun(folder: Path, **settings: Any) -> Replays:
    """A store in which device a has begun a round and sent samples 5 and 7."""
    settings = {"max_bytes": 1e6, **settings}
    replays = Replays(folder / "kept", **settings)
    replays.begin(RoundStart(stamp=Stamp(device="a"), end_step=9, is_full=True), ())
    replays.keep("a", activation((5, 7)), tensors((4, 3), state(4), state(3, 1)), FROZEN)
    return replays


def whole(replays: Replays, message: Activation, given: dict[str, Array]) -> Array:
    """The hidden states of a micro-batch."""
    found: Array = replays.whole("a", Envelope(message, given)).tensors["hidden"]
    return found


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_state_comes_back_as_it_came(tmp_path: Path, codec: str) -> None:
    """Whatever its codec on the wire, in as few bytes as lose nothing."""
    came = codecs.as_read(state(6), codec)
    file = StateFile(tmp_path / "a.states", "wire")

    file.put(3, came)

    np.testing.assert_array_equal(file.get(3), came)
    halves = codec in ("bfloat16", "float16")
    assert file.num_bytes == (tmp_path / "a.states").stat().st_size
    assert file.num_bytes == came.size * (2 if halves else 4)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-3), ("int8", 2e-2)])
def test_a_smaller_dtype_loses_little(tmp_path: Path, dtype: str, most: float) -> None:
    """Half or a quarter of the bytes, and an error of that order."""
    file = StateFile(tmp_path / "a.states", dtype)

    file.put(3, state(64))

    error = np.abs(file.get(3) - state(64)).max() / np.abs(state(64)).max()
    assert 0 < error < most
    assert file.num_bytes < 4 * state(64).size * 0.6


def test_rows_are_joined_with_those_that_came(tmp_path: Path) -> None:
    """Kept ones from the file, others from the message, padding is nought."""
    replays = begun(tmp_path)
    assert replays.take_kept("a", 0, 0)
    assert not replays.take_kept("a", 0, 0)

    given = tensors((4, 3, 3), state(3, 2))
    given["hidden"] = np.pad(given["hidden"], ((0, 0), (0, 4 - given["hidden"].shape[1]), (0, 0)))
    found = whole(replays, activation((5, 9, 7), (0, 2)), given)

    np.testing.assert_array_equal(found[0], state(4))
    np.testing.assert_array_equal(found[1, :3], state(3, 2))
    np.testing.assert_array_equal(found[2, :3], state(3, 1))
    assert not found[2, 3:].any()
    assert replays.take_replayed() == 2
    assert replays.has_replayed("a", 0)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (activation((5, 8), (0, 1)), tensors((4, 3))),
        (activation((5, 7), (0, 1)), tensors((4, 4))),
        (activation((5, 7), (0,)), tensors((4, 3))),
        (activation((5, 7), (0, 1)), tensors((4, 3), state(4))),
        (activation((5,), (0, 1)), tensors((4, 3))),
        (activation((5, 9), (0,)), {**tensors((4, 3)), "hidden": np.zeros((1, 0, 0), np.float32)}),
        (activation((5, 9), (0,)), {**tensors((4, 99)), "hidden": state(3)[None]}),
    ],
)
def test_what_is_not_kept_or_does_not_fit_is_refused(
    tmp_path: Path, message: Activation, given: dict[str, Array]
) -> None:
    """A device that counts on more than it was told ends its own part."""
    with pytest.raises(RemoteProtocolError):
        whole(begun(tmp_path), message, given)


def test_nothing_is_kept_of_blocks_that_are_trained_or_unasked(tmp_path: Path) -> None:
    """Only forward-only plans and activations that name their samples count."""
    replays = Replays(tmp_path / "kept", 1e6)
    trained = Plan(split=2, ranks={"w": 4}, alphas={"w": 1.0}, batch_size=2, micro_batch=2)

    replays.keep("a", activation((5,)), tensors((4,), state(4)), trained)
    replays.keep("a", activation(()), tensors((4,), state(4)), FROZEN)
    Replays().keep("a", activation((5,)), tensors((4,), state(4)), FROZEN)

    assert not replays.take_kept("a", 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_bound_holds_for_all_devices_together(tmp_path: Path) -> None:
    """What has no room is not kept, and its device is not told that it is."""
    replays = begun(tmp_path, max_bytes=4 * 8 * WIDTH)

    replays.keep("b", activation((5,), device="b"), tensors((4,), state(4)), FROZEN)

    assert replays.take_kept("a", 0, 0)
    assert not replays.take_kept("b", 0, 0)


@pytest.mark.parametrize("ends", ["forgotten", "changed", "closed"])
def test_files_go_when_they_hold_no_more(tmp_path: Path, ends: str) -> None:
    """A device that begins anew, a change in its blocks and the end of the run leave no file."""
    replays = begun(tmp_path)
    (path,) = (tmp_path / "kept").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    if ends == "forgotten":
        replays.forget("a")
    elif ends == "changed":
        replays.begin(RoundStart(stamp=Stamp(device="a"), end_step=9, is_full=False), ("w.U",))
    else:
        replays.close()

    assert not path.exists()
    assert not replays.take_kept("a", 0, 0)
    with pytest.raises(RemoteProtocolError, match="not kept"):
        whole(replays, activation((5,), (0,)), tensors((4,)))


def test_a_damaged_state_is_noticed(tmp_path: Path) -> None:
    """Its device has to begin anew; it is not to blame."""
    replays = begun(tmp_path)
    whole(replays, activation((5,), (0,)), tensors((4,)))
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(bytes(path.stat().st_size))

    with pytest.raises(LocalProtocolError, match="damaged"):
        whole(replays, activation((5,), (0,)), tensors((4,)))


def test_a_folder_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is kept already stays; nothing more is kept, and the log says why."""
    replays = begun(tmp_path)
    (tmp_path / "kept" / "b.states").mkdir()

    replays.keep("b", activation((5,), device="b"), tensors((4,), state(4)), FROZEN)

    assert not replays.take_kept("b", 0, 0)
    assert "replay.full" in caplog.text
    np.testing.assert_array_equal(
        whole(replays, activation((5,), (0,)), tensors((4,)))[0], state(4)
    )
