"""Waves that are away go back whole, the oldest first, and in order for each device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds.step.away import Away
from edge_sdk.protocol.plan import Place

PLACES = st.tuples(st.sampled_from("abc"), st.integers(0, 3))


def oldest_whole(waves: list[list[Place]], returned: set[Place]) -> list[Place]:
    """The wave that can go back, as it is defined: looked for among all of them."""
    earlier = set[str]()
    for wave in waves:
        devices = {device for device, _ in wave}
        if not devices & earlier and all(place in returned for place in wave):
            return wave
        earlier |= devices
    return []


@given(st.lists(st.sets(PLACES, min_size=1, max_size=3), max_size=6), st.lists(PLACES), st.data())
def test_the_next_wave_is_that_of_its_definition(
    sent: list[set[Place]], back: list[Place], data: st.DataObject
) -> None:
    """Whatever has come back or left, what is counted as it happens finds the same wave."""
    away, waves, known = Away(), list[list[Place]](), set[Place]()
    for each in sent:
        if wave := sorted(each - known):
            known |= each
            waves.append(wave)
            away.send([*wave])
    for place in back:
        away.come_back(place)
    returned = set(back) & known
    for place in data.draw(
        st.lists(st.sampled_from(sorted(known)), unique=True) if known else st.just([])
    ):
        away.remove(place)
        waves = [rest for wave in waves if (rest := [p for p in wave if p != place])]
        returned.discard(place)
        known.discard(place)

        assert away.oldest_whole() == oldest_whole(waves, returned)
        assert away.returned == returned
        assert {p for wave in waves for p in wave} == {p for p in known if p in away}
        assert [device in away.devices for device in "abc"] == [
            any(p[0] == device for p in known) for device in "abc"
        ]
    assert away.oldest_whole() == oldest_whole(waves, returned)
