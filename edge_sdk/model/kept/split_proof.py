"""The verdict on a model's split, kept in the cache: a model is checked once, not at every start.

It depends on the model's config, the versions of what computes, and our own code. Only a good
verdict is kept: what went wrong may have been the moment.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import StorageError, one_line
from edge_sdk.files import atomic_write

if TYPE_CHECKING:
    from edge_sdk.model.layout import Task
    from edge_sdk.model.weights import ModelSource

log = logging.getLogger(__name__)

COMPUTERS = ("torch", "transformers")
_here: dict[str, str] = {}
"""Verdicts of this process, wherever they are kept: simulations make many runs in one."""


def prove_split(config: Any, task: Task, folder: Path) -> None:
    """Make sure that the model of *config* computes the same in pieces, as it once has here.

    Args:
        config: The model's configuration, as transformers reads it.
        task: What the model is used for.
        folder: Where verdicts are kept.

    Raises:
        ModelError: it does not; the message says why.
    """

    def check() -> str:
        from edge_sdk.model.split_check import check_split

        check_split(config, task)
        return ""

    _once(folder, f"{config.to_json_string()} {task}", check)


def prove_weights(source: ModelSource, model_hash: str, folder: Path) -> str:
    """Make sure of the same with the weights of the first and the last block, if they are small.

    Args:
        source: The model.
        model_hash: Hash of all its parts.
        folder: Where verdicts are kept.

    Returns:
        Why it was not checked, or nothing.

    Raises:
        ModelError: the weights compute something else in pieces; the message says what.
    """

    def check() -> str:
        from edge_sdk.model.split_check import check_weights

        return check_weights(source.config, source.task, source.layout, source.tensors)

    return _once(folder, f"weights {model_hash} {source.task}", check)


def _once(folder: Path, subject: str, check: Callable[[], str]) -> str:
    key = _key(subject)
    if key in _here:
        return _here[key]
    path = folder / f"{key}.split.json"
    known = _read(path)
    if known is None:
        known = check()
        log.info("split.checked note=%s", known or "equal")
        with suppress(StorageError):  # a cache that cannot be written costs a second check
            atomic_write(path, json.dumps({"note": known}), mode=0o666, sync=False)
    _here[key] = known
    return known


def _read(path: Path) -> str | None:
    """Return the note of a kept verdict; None where there is none, or a damaged one."""
    try:
        note = json.loads(path.read_text("utf-8"))["note"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:  # as a power cut may have left it
        log.warning("split.damaged file=%s reason=%s; checked again", path, one_line(error))
        return None
    return note if isinstance(note, str) else None


def _key(subject: str) -> str:
    versions = [importlib.metadata.version(name) for name in COMPUTERS]
    digest = hashlib.sha256(json.dumps([subject, versions]).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
