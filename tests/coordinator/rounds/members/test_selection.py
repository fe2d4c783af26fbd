"""Who is drawn for a round: as the seed, the round and those who are there say, and no more."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from coordinator.rounds.members.selection import Attendance, Selection

NAMES = [f"device-{n:02}" for n in range(20)]


def draws(selection: Selection, rounds: int, names: list[str] = NAMES) -> list[list[str]]:
    """Draw so many rounds; everybody is there, and finishes."""
    found = []
    for round_ in range(rounds):
        found.append(selection.draw(round_, names, names))
        selection.ended(found[-1])
    return found


def test_without_a_number_everybody_is_in() -> None:
    """A run that draws nobody has all who are fit, and nothing to remember."""
    selection = Selection(None, 0)

    assert draws(selection, 2) == [NAMES, NAMES]
    assert selection.facts() == {}


def test_equal_runs_draw_alike_and_other_seeds_do_not() -> None:
    """Seed, round and who is there decide; the order in which they came does not."""
    first, again = draws(Selection(5, 1), 4), draws(Selection(5, 1), 4, NAMES[::-1])

    assert first == again != draws(Selection(5, 2), 4)
    assert len({tuple(names) for names in first}) > 1


def test_who_else_is_there_moves_only_one_place() -> None:
    """A device that is away gives its place to one other, and moves nobody else."""
    everybody = Selection(5, 3).draw(0, NAMES, NAMES)
    left = [name for name in NAMES if name != everybody[0]]

    without = Selection(5, 3).draw(0, left, left)

    assert set(everybody[1:]) < set(without)


def test_more_places_than_devices_take_everybody() -> None:
    """Nobody waits where there is room for all."""
    assert Selection(50, 0).draw(0, NAMES, NAMES) == NAMES


def test_a_round_that_is_begun_again_has_its_devices() -> None:
    """Those who were drawn stay in; for one that is gone somebody else comes, and goes again."""
    selection = Selection(5, 4)
    first = selection.draw(0, NAMES, NAMES)
    left = [name for name in NAMES if name != first[0]]

    second = selection.draw(0, left, left)

    assert set(first[1:]) < set(second)
    assert selection.draw(0, left, left) == second


def test_a_resumed_run_draws_what_an_uninterrupted_one_does() -> None:
    """What a checkpoint holds is all that the next draws depend on, in mid-round as between two."""
    whole, before = Selection(5, 5), Selection(5, 5)
    draws(whole, 3)
    draws(before, 3)
    before.draw(3, NAMES, NAMES)
    after = Selection(5, 5)
    after.load_facts(json.loads(json.dumps(before.facts())))

    for round_ in (3, 4, 5):
        drawn = whole.draw(round_, NAMES, NAMES)
        assert after.draw(round_, NAMES, NAMES) == drawn
        whole.ended(drawn[1:])
        after.ended(drawn[1:])


def test_equal_devices_are_drawn_equally_often() -> None:
    """Without a past each device has the same chance, whatever its name."""
    counts = Counter(
        name for seed in range(2000) for name in Selection(5, seed).draw(0, NAMES, NAMES)
    )

    expected = 2000 * 5 / 20
    assert all(abs(counts[name] - expected) < 5 * (expected * 0.75) ** 0.5 for name in NAMES)


def test_who_finishes_half_as_often_is_drawn_half_as_often() -> None:
    """One place goes to a device in proportion to its availability."""
    sure = Attendance(rounds=98, there=98, drawn=98, finished=98)
    half = Attendance(rounds=98, there=98, drawn=98, finished=49)
    counts: Counter[str] = Counter()
    for seed in range(4000):
        selection = Selection(1, seed)
        selection.load_facts({"known": {"a": vars(sure), "b": vars(half)}})
        counts.update(selection.draw(0, ["a", "b"], ["a", "b"]))

    chance = half.availability / (half.availability + sure.availability)
    assert chance == pytest.approx(0.3355, abs=1e-3)
    assert counts["b"] / 4000 == pytest.approx(chance, abs=0.03)


def test_attendance_counts_what_was_there_drawn_and_finished() -> None:
    """A round that ends counts for all who were ever there, once."""
    selection = Selection(1, 0)
    (first,) = selection.draw(0, ["a", "b"], ["a", "b"])
    selection.ended([])
    selection.draw(1, ["b"], ["b"])
    selection.ended(["b"])

    known = {name: Attendance(**one) for name, one in selection.facts()["known"].items()}
    assert (known["a"].rounds, known["a"].there, known["a"].finished) == (2, 1, 0)
    assert (known["b"].rounds, known["b"].there, known["b"].finished) == (2, 2, 1)
    assert known[first].drawn == 1 + (first == "b")
