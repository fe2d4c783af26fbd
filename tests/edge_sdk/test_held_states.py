"""What is held of samples: bounded, brought back as it was, and whole or not there."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import StorageError
from edge_sdk.held_states import ENTRY_BYTES, Halves, HeldStates, mark_of


def halves(value: int, positions: int = 3) -> Halves:
    """An array of one number."""
    return np.full((positions, 4), value, np.uint16)


def content(held: HeldStates) -> dict[int, int]:
    """What is held, by sample."""
    found = {sample: held.get(sample) for sample in range(20)}
    return {sample: int(entry.array_TD[0, 0]) for sample, entry in found.items() if entry}


def test_a_mark_is_that_of_the_bytes() -> None:
    """Equal arrays have equal marks, others have others, and none is 0, which stands for none."""
    held = HeldStates(10_000)
    held.put(1, halves(7))
    held.put(2, halves(7))
    held.put(3, halves(8))

    marks = [entry.mark for sample in (1, 2, 3) if (entry := held.get(sample))]

    assert marks[0] == marks[1] == mark_of(halves(7)) != marks[2]
    assert all(0 < mark < 2**63 for mark in marks)


def test_what_is_full_takes_in_nothing_new() -> None:
    """With room for two, a third is not held; another array of one of the two is."""
    held = HeldStates(2 * (halves(0).nbytes + ENTRY_BYTES))

    for sample, value in ((1, 10), (2, 20), (3, 30), (1, 11)):
        held.put(sample, halves(value))

    assert content(held) == {1: 11, 2: 20}


Change = st.tuples(st.sampled_from(["put", "forget", "commit", "back"]), st.integers(0, 5))


@given(changes=st.lists(Change, max_size=40))
def test_the_last_commit_comes_back(changes: list[tuple[str, int]]) -> None:
    """Whatever happens after a commit, going back finds just what was there."""
    held = HeldStates(4 * (halves(0).nbytes + ENTRY_BYTES))
    committed: dict[int, int] = {}

    for value, (what, sample) in enumerate(changes):
        if what == "put":
            held.put(sample, halves(value))
        elif what == "forget":
            held.forget([sample])
        elif what == "commit":
            held.commit(1)
            committed = content(held)
        else:
            held.roll_back()
            assert content(held) == committed
    held.roll_back()

    assert content(held) == committed
    assert len(held) == len(committed) <= 4


def test_a_round_that_begins_again_finds_the_same() -> None:
    """The same number goes back to the last commit; another one goes on from here."""
    held = HeldStates(10_000)
    held.begin_round(0)
    held.put(1, halves(1))
    held.commit(5)
    held.begin_round(1)
    held.put(1, halves(2))

    held.begin_round(1)
    again = content(held)
    held.put(1, halves(3))
    held.begin_round(2)

    assert (again, content(held)) == ({1: 1}, {1: 3})


def test_a_commit_in_the_middle_of_a_step_is_of_the_step_before() -> None:
    """What has been sent of the step at which a run stops is undone: it will be sent again."""
    held = HeldStates(10_000)
    for step in (3, 4, 5):
        held.begin_step(step)
        held.put(1, halves(step))
        held.put(step, halves(step))

    held.commit(5)
    found = content(held)
    held.begin_step(5)
    held.put(1, halves(6))
    held.roll_back()

    assert found == content(held) == {1: 4, 3: 3, 4: 4}


def test_another_process_finds_what_was_committed(tmp_path: Path) -> None:
    """Commits are read from the log, what came after the last one is not."""
    held = HeldStates(10_000, tmp_path / "held.log")
    held.put(1, halves(1))
    held.put(2, halves(2))
    held.commit(1)
    held.put(1, halves(5, positions=2))
    held.forget([2])
    held.put(3, halves(3))
    held.commit(1)
    held.put(4, halves(4))

    found = HeldStates(10_000, tmp_path / "held.log")

    assert content(found) == {1: 5, 3: 3}
    found.put(5, halves(5))
    found.commit(1)
    assert content(HeldStates(10_000, tmp_path / "held.log")) == {1: 5, 3: 3, 5: 5}


@given(cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_a_damaged_log_gives_what_was_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    """Cut anywhere or with a wrong bit anywhere, what is found was held at some commit."""
    path = tmp_path_factory.mktemp("log") / "held.log"
    held, states = HeldStates(10_000, path), [{}]
    for value in range(4):
        held.put(value, halves(value + 1))
        held.put(0, halves(value + 10))
        held.commit(1)
        states.append(content(held))
    data = bytearray(path.read_bytes())
    if flip < len(data):
        data[flip] ^= 1
    path.write_bytes(data[: len(data) - cut])

    found = HeldStates(10_000, path)

    assert content(found) in states
    found.put(9, halves(9))
    found.commit(1)
    assert content(HeldStates(10_000, path)) == content(found)


def test_a_log_does_not_grow_without_end(tmp_path: Path) -> None:
    """A log with far more in it than is held is written anew."""
    path, large = tmp_path / "held.log", np.zeros((100, 500), np.uint16)
    held = HeldStates(10**9, path)

    for value in range(60):
        held.put(0, large + np.uint16(value))
        held.commit(1)

    assert path.stat().st_size < 4 * 2**20
    assert content(HeldStates(10**9, path)) == {0: 59}


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    """A file where the folder should be is an error of storage, before anything is held."""
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match="file"):
        HeldStates(10, tmp_path / "file" / "held.log")


def test_a_commit_goes_on_without_what_came_after_it(tmp_path: Path) -> None:
    """A step that goes on stays held, and is no part of the commit, in memory as in the log."""
    held = HeldStates(10_000, tmp_path / "log")
    held.begin_round(0)
    held.begin_step(3)
    held.put(1, halves(1))
    held.begin_step(4)
    held.put(1, halves(2))
    held.put(2, halves(3))

    held.commit(4, goes_on=True)

    assert content(held) == {1: 2, 2: 3}
    assert content(HeldStates(10_000, tmp_path / "log")) == {1: 1}
    held.begin_round(0)
    assert content(held) == {1: 1}


def test_a_commit_that_the_other_side_has_not_made_is_undone(tmp_path: Path) -> None:
    """A round that begins before the last commit finds the one before, in memory as in the log."""
    held = HeldStates(10_000, tmp_path / "log")
    held.begin_round(0)
    for step in (3, 4):
        held.begin_step(step)
        held.put(1, halves(step))
        held.commit(step + 1, goes_on=True, may_fail=True)

    held.begin_round(0, 4)

    assert content(held) == {1: 3}
    assert content(HeldStates(10_000, tmp_path / "log")) == {1: 3}
