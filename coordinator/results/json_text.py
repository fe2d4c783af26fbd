"""JSON as every parser reads it: what is no number there becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


def json_text(value: object, indent: int | None = None) -> str:
    """Return *value* as JSON in ASCII, keys sorted; NaN and infinities are null."""
    try:
        text = json.dumps(value, sort_keys=True, indent=indent, allow_nan=False)
    except ValueError:  # a number that JSON does not have
        text = ""
    # Half a surrogate, as in the name of a file that is no UTF-8, is refused by many parsers.
    if not text or "\\ud" in text:
        text = json.dumps(_plain(value), sort_keys=True, indent=indent, allow_nan=False)
    return text


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value
