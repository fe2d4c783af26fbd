"""Enrolment codes: what is read is what was written, and every slip of a hand is noticed."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from edge_sdk.errors import ConfigError
from edge_sdk.transport.enrol_code import (
    ALPHABET,
    SECRET_BYTES,
    EnrolCode,
    new_code,
    one_time_keys,
    read_code,
    write_code,
)
from edge_sdk.transport.keys import make_key_pair

SERVER = make_key_pair()
ADDRESS = "tcp://192.168.1.10:7070"
CODE = new_code(ADDRESS, SERVER.public)
TEXT = write_code(CODE)

hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
    st.from_regex(r"\A[a-zA-Z0-9]([a-zA-Z0-9.-]{0,60}[a-zA-Z0-9])?\Z"),
)
codes = st.builds(
    lambda host, port, key, secret: EnrolCode(
        address=f"tcp://{host}:{port}", server_key=z85.encode(key).decode(), secret=secret
    ),
    hosts,
    st.integers(1, 65535),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
)


@given(codes)
@example(new_code("tcp://[fe80::1%eth0]:7070", SERVER.public))
@example(new_code("tcp://[FE80::1]:1", SERVER.public))
@settings(max_examples=60, deadline=None)
def test_what_is_read_is_what_was_written(code: EnrolCode) -> None:
    """Whatever address, key and secret, in letters that nobody confuses."""
    text = write_code(code)

    assert read_code(text) == code
    assert set(text) <= {*ALPHABET, "-"}


@given(codes, st.data())
@settings(max_examples=60, deadline=None)
def test_how_it_was_copied_does_not_matter(code: EnrolCode, data: st.DataObject) -> None:
    """Small letters, O for 0, I and L for 1, and any dashes, spaces, quotes and line ends."""
    lookalikes = {"0": "0Oo", "1": "1IiLl"}
    between = st.text("- \n\t'\"._\u2013\u00a0", max_size=2)
    copied = "".join(
        data.draw(st.sampled_from(lookalikes.get(letter, letter + letter.lower())))
        + data.draw(between)
        for letter in write_code(code).replace("-", "")
    )

    assert read_code(copied) == code


@given(st.integers(0, len(TEXT) - 1), st.sampled_from(ALPHABET))
@settings(max_examples=100, deadline=None)
def test_a_wrong_letter_is_always_noticed(place: int, letter: str) -> None:
    """The check is sure to find one letter that was read for another one."""
    if TEXT[place] not in ("-", letter):
        with pytest.raises(ConfigError, match="mistyped|letters where|version"):
            read_code(TEXT[:place] + letter + TEXT[place + 1 :])


@given(st.integers(0, 94))
@settings(max_examples=50, deadline=None)
def test_two_letters_that_were_swapped_are_always_noticed(place: int) -> None:
    """The check is sure to find that, too."""
    letters = list(TEXT.replace("-", ""))
    if letters[place] != letters[place + 1]:
        letters[place : place + 2] = letters[place + 1], letters[place]
        with pytest.raises(ConfigError):
            read_code("".join(letters))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" - \n", "is empty"),
        ("hello", "it has only 5 letters"),
        (TEXT[:20], "it has only 18 letters|has 18 letters where 96"),
        (TEXT[:-9], "has 88 letters where 96 are due"),
        (TEXT + "AB", "has 98 letters where 96 are due"),
        (TEXT[:-1] + ("A" if TEXT[-1] != "A" else "B"), "mistyped"),
        ("U" + TEXT[1:], "no enrolment code has 'U', the letter 1 of this one"),
        (TEXT[:3] + "\u0410" + TEXT[4:], "the letter 4 of this one"),
    ],
    ids=["empty", "dashes", "word", "begun", "short", "long", "mistyped", "foreign", "cyrillic"],
)
def test_what_is_wrong_with_a_code_is_named(text: str, words: str) -> None:
    """A person reads in one line what to do about it, and not the code itself."""
    with pytest.raises(ConfigError, match=words) as caught:
        read_code(text)

    assert "\n" not in str(caught.value)
    assert TEXT not in str(caught.value)


@pytest.mark.parametrize("text", ["0123456789abcdef" * 6, "0" * 96, "Z" * 200, "\ud800"])
def test_what_is_no_code_is_refused(text: str) -> None:
    """Any letters at all lead to an error for a person and nothing else."""
    with pytest.raises(ConfigError):
        read_code(text)


def test_the_secret_is_long_and_shows_nowhere() -> None:
    """At least 128 bits, drawn anew for each code, that are in no `repr`."""
    other = new_code(ADDRESS, SERVER.public)

    assert 8 * len(CODE.secret) >= 128
    assert CODE.secret != other.secret
    assert repr(CODE.secret) not in repr(CODE)
    assert math.log2(len(ALPHABET)) == 5


def test_the_one_time_key_follows_from_secret_and_coordinator() -> None:
    """The same on both sides; another one with any other secret or coordinator."""
    elsewhere = EnrolCode(address=ADDRESS, server_key=make_key_pair().public, secret=CODE.secret)

    assert one_time_keys(read_code(TEXT)) == one_time_keys(CODE)
    keys = {one_time_keys(c).public for c in (CODE, elsewhere, new_code(ADDRESS, SERVER.public))}
    assert len(keys) == 3
