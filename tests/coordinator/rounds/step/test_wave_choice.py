"""Who is run together: whoever is behind, with rows of about the same length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds.step.wave_choice import MOST_PADDING, BatchQueue, Limits, Rows, Turns
from edge_sdk.protocol.plan import Place

WIDE = Limits(tokens=10_000, rows=100)


class Candidate(NamedTuple):
    """A micro-batch that can be run now."""

    place: Place
    rows: Rows
    left: int
    """Micro-batches of its device that the step still needs, this one included."""


@dataclass
class Member:
    """A member of the round, as far as its steps go."""

    num_micro: int
    looks_ahead: bool = True
    batch_size: int = 1
    is_local: bool = False


def choose(waiting: list[Candidate], limits: Limits) -> list[Place]:
    """What is run together of those that have arrived in that order."""
    queue = BatchQueue()
    members = {one.place[0]: Member(one.place[1] + one.left) for one in waiting}
    for one in waiting:
        queue.add(one.place, one.rows)
    return queue.choose(Turns(members, (), labels_on_device=False), limits)


def waiting(device: str, micro: int = 0, longest: int = 10, left: int = 1) -> Candidate:
    """A micro-batch of two rows."""
    return Candidate((device, micro), Rows(2, longest), left)


def test_nothing_waits() -> None:
    """Where nothing waits nothing is run."""
    assert choose([], WIDE) == []


def test_all_that_is_there_is_run_together() -> None:
    """Several micro-batches of a device, and those of the others."""
    there = [waiting("a", 0, left=2), waiting("b"), waiting("a", 1)]

    assert sorted(choose(there, WIDE)) == [("a", 0), ("a", 1), ("b", 0)]


def test_whoever_is_behind_comes_first() -> None:
    """Where not all fit, the device with the most left is served."""
    there = [waiting("a", 2, left=1), waiting("b", 0, left=3), waiting("c", 1, left=2)]

    assert choose(there, Limits(tokens=20, rows=2)) == [("b", 0)]
    assert choose(there, Limits(tokens=40, rows=100)) == [("b", 0), ("c", 1)]


def test_rows_of_similar_length_are_run_together() -> None:
    """Nobody is padded to more than twice its length; the nearest lengths come first."""
    there = [waiting("a", longest=10), waiting("b", longest=50), waiting("c", longest=12)]

    assert choose(there, WIDE) == [("a", 0), ("c", 0)]
    assert choose(there[1:], WIDE) == [("b", 0)]


def test_padding_counts() -> None:
    """Tokens are those of all rows at the length of the longest."""
    there = [waiting("a", longest=10), waiting("b", longest=20)]

    assert choose(there, Limits(tokens=79, rows=100)) == [("a", 0)]
    assert choose(there, Limits(tokens=80, rows=100)) == [("a", 0), ("b", 0)]


def test_one_alone_is_always_run() -> None:
    """A micro-batch that is larger than any wave may be is a wave of its own."""
    assert choose([waiting("a", longest=900)], Limits(tokens=1, rows=1)) == [("a", 0)]


DEVICES = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 99)), max_size=4), max_size=5
)


@given(DEVICES, st.integers(1, 2000), st.integers(1, 12))
def test_every_wave_keeps_order_and_limits(
    sizes: list[list[tuple[int, int]]], tokens: int, rows: int
) -> None:
    """Whatever waits: each device in its order, within the limits, until nothing is left."""
    there = [
        Candidate((f"d{device}", micro), Rows(*size), len(own) - micro)
        for device, own in enumerate(sizes)
        for micro, size in enumerate(own)
    ]
    sizes_by_place = {one.place: one.rows for one in there}
    done: list[tuple[str, int]] = []
    while there:
        wave = choose(there, Limits(tokens, rows))
        assert wave
        chosen = [sizes_by_place[place] for place in wave]
        longest = max(one.longest for one in chosen)
        if len(wave) > 1:
            total = sum(one.num for one in chosen)
            assert total <= rows
            assert total * longest <= tokens
            assert longest <= MOST_PADDING * min(one.longest for one in chosen)
        done += wave
        there = [one for one in there if one.place not in wave]

    for device, own in enumerate(sizes):
        assert [micro for name, micro in done if name == f"d{device}"] == list(range(len(own)))


def plainly(waiting: list[Candidate], limits: Limits) -> list[Place]:
    """What is chosen, as it is defined: the nearest of all heads, looked for anew each time."""
    queues: dict[str, list[Candidate]] = {}
    for one in waiting:
        queues.setdefault(one.place[0], []).append(one)
    if not queues:
        return []
    first = max((queue[0] for queue in queues.values()), key=lambda one: one.left)
    chosen = [queues[first.place[0]].pop(0)]
    while heads := [queue[0] for queue in queues.values() if queue]:
        nearest = min(heads, key=lambda o: (abs(o.rows.longest - first.rows.longest), -o.left))
        rows = sum(one.rows.num for one in [*chosen, nearest])
        lengths = [one.rows.longest for one in [*chosen, nearest]]
        fits = rows <= limits.rows and rows * max(lengths) <= limits.tokens
        if fits and max(lengths) <= MOST_PADDING * min(lengths):
            chosen.append(queues[nearest.place[0]].pop(0))
        else:
            queues[nearest.place[0]].clear()
    return [one.place for one in chosen]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(1, 9)), max_size=20),
    st.dictionaries(st.integers(0, 6), st.integers(1, 9)),
    st.integers(1, 200),
    st.integers(-2, 30),
)
def test_choice_is_that_of_its_definition(
    sizes: list[tuple[int, int, int]], totals: dict[int, int], tokens: int, rows: int
) -> None:
    """A heap finds the wave that a look at all heads for each place of it finds, in its order."""
    come: dict[int, int] = {}
    waiting = []
    for device, num, longest in sizes:
        micro = come.get(device, 0)
        come[device] = micro + 1
        left = totals.get(device, 4) + 20 - micro
        waiting.append(Candidate((f"d{device}", micro), Rows(num, longest), left))
    limits = Limits(tokens, rows)

    assert choose(waiting, limits) == plainly(waiting, limits)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("come", "come", "come", "wave", "wave", "back", "leave")),
            st.integers(0, 5),
            st.integers(1, 3),
            st.integers(1, 9),
        ),
        max_size=60,
    ),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.integers(1, 100),
    st.integers(1, 12),
)
def test_waves_of_a_whole_step_are_those_of_the_definition(
    happens: list[tuple[str, int, int, int]], looking: list[bool], tokens: int, rows: int
) -> None:
    """Whatever comes, goes away, comes back and leaves: a wave is of all that may have a turn."""
    members = {f"d{n}": Member(60, looks_ahead) for n, looks_ahead in enumerate(looking)}
    queue, limits, come = BatchQueue(), Limits(tokens, rows), dict.fromkeys(members, 0)
    away: list[Place] = []
    for what, number, num, longest in happens:
        device = f"d{number}"
        if what == "come":
            queue.add((device, come[device]), Rows(num, longest))
            come[device] += 1
        elif what == "wave":
            gone = {name for name, _ in away}
            wave = queue.choose(Turns(members, gone, labels_on_device=True), limits)
            assert wave == plainly(may_go(queue, members, gone), limits)
            for place in wave:
                queue.remove(place)
            away += wave
        elif what == "leave":  # and begins anew
            for place in [place for place in queue.places if place[0] == device]:
                queue.remove(place)
            away, come[device] = [place for place in away if place[0] != device], 0
            queue.look_again(device)
        elif mine := [place for place in away if place[0] == device]:
            away.remove(mine[0])
            queue.look_again(device)


def may_go(queue: BatchQueue, members: dict[str, Member], away: set[str]) -> list[Candidate]:
    """All that may have a turn: of who does not look ahead one at a time."""
    found, singles = [], set(away)
    for (device, micro), rows in queue.places.items():
        member = members[device]
        if member.looks_ahead or device not in singles:
            found.append(Candidate((device, micro), rows, member.num_micro - micro))
            singles.add(device)
    return found
