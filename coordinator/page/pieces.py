"""What is shown, in pieces that are sent anew only when they change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """A part of what is shown, as it was last written."""

    version: int
    """Larger than that of everything that was there before."""
    text: str
    """JSON."""


class Watched(Protocol):
    """Something that can be looked at again and again."""

    @property
    def parts(self) -> Mapping[str, Piece]:
        """By name; another mapping whenever something has changed."""

    def refresh(self) -> bool:
        """Look again; return whether there is something new."""


def changes(parts: Mapping[str, Piece], sent: Mapping[str, int]) -> str | None:
    """Return the JSON that makes *sent* of *parts*, which somebody has got; None: nothing to say.

    Args:
        parts: What there is.
        sent: The version of each part that was sent.
    """
    new = [name for name, part in parts.items() if sent.get(name) != part.version]
    gone = sorted(sent.keys() - parts.keys())
    if not new and not gone:
        return None
    values = ", ".join(f"{json.dumps(name)}: {parts[name].text}" for name in new)
    return f'{{"gone": {json.dumps(gone)}, "set": {{{values}}}}}'
