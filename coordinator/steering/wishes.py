"""What an operator wants of a run that goes on, and how that is said in a line of bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["pause", "stop"]
# The longest honest wish is a quarter of it: this is what a stranger can make a run keep.
MOST_BYTES = 256


@dataclass(frozen=True, slots=True)
class Wish:
    """That a run be left: so that it can go on just here, or with the result that it has."""

    kind: Kind = "pause"
    after_round: bool = False
    """Whether it first comes to the end of the round, if one goes on; else of the step."""
    is_urgent: bool = False
    """Whether to leave in seconds even where a step takes longer: as a service must that is told
    to end."""


URGENT = Wish(is_urgent=True)
"""What Ctrl-C and SIGTERM say."""


def encode(wish: Wish) -> bytes:
    """Return the line that says what is wanted."""
    return json.dumps({"wish": wish.kind, "after_round": wish.after_round}).encode() + b"\n"


def decode(line: bytes) -> Wish:
    """Return what a line asks for.

    Raises:
        ValueError: it asks for nothing that is known here.
    """
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(said, dict) or said.keys() != {"wish", "after_round"}:
        raise ValueError("not a wish and after_round")
    kind, after_round = said["wish"], said["after_round"]
    if kind not in get_args(Kind) or not isinstance(after_round, bool):
        raise ValueError("wish must be pause or stop, and after_round true or false")
    return Wish(kind, after_round)
