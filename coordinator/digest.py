"""A short name for what a run was told and what it read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from edge_sdk.config.loader import dump_config


def digest_of(config: object, data: Iterable[str | None]) -> str:
    """Return 12 letters that are equal for equal configs and equal bytes of *data*.

    Args:
        config: A dataclass, as `dump_config` takes it.
        data: Files; ids of data sets and None stand for nothing.
    """
    found = hashlib.sha256(dump_config(config).encode())
    for path in data:
        if path is not None and Path(path).is_file():  # not the id of a data set
            found.update(Path(path).read_bytes())
    return found.hexdigest()[:12]
