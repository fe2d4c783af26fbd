"""Classes by name: a device may list them in another order than the run, never other ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from edge_sdk.data.rows import Row
from edge_sdk.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a run and how a device's rows name them."""

    names: tuple[str, ...]
    """Texts by which the data may name a class; empty: it has numbers only."""
    numbers: tuple[int, ...]
    """The run's number of each class in the order of *names*; empty where nobody has counted."""
    is_own: bool
    """Whether the device lists the names itself."""

    def number(self, row: Row) -> int:
        """Return the run's number of a row's class, from 0.

        Raises:
            DataError: A name that is not in the list of labels, or a number out of range.
        """
        label = row.label
        if isinstance(label, str) and label in self.names:
            return self.numbers[self.names.index(label)]
        if isinstance(label, str) and not self.is_own and label.isdecimal():
            label = int(label)  # CSV knows only text
        if not isinstance(label, int):
            listed = "`labels`" if self.is_own else "classes of the run"
            known = f"one of the {len(self.names)} {listed}"
            what = known if self.names else "a number; list them as `labels`"
            raise DataError(f"{row.where}: label is not {what}")
        count = len(self.numbers)
        if label < 0 or (self.numbers and label >= count):
            bound = f" and below {count}" if self.numbers else ""
            raise DataError(f"{row.where}: label is {label}, must be at least 0{bound}")
        return self.numbers[label] if self.numbers else label


def find_classes(labels: Sequence[str], names: Sequence[str], count: int | None) -> Classes:
    """Return the classes of rows whose device lists *labels* in a run with *names*.

    Args:
        labels: The device's names in the order of its numbers; empty: those of the run hold.
        names: The run's names in the order of its numbers; empty where it has not sent them.
        count: Classes of the run's model, None where there is no run.

    Raises:
        ConfigError: More labels than classes, or one that the run does not have.
    """
    labels, names = tuple(labels), tuple(names)
    count = count or len(names) or len(labels) or None
    if count is not None and len(labels) > count:
        raise ConfigError(f"labels has {len(labels)} names, the model {count} classes")
    if not labels or not names:
        return Classes(labels or names, tuple(range(count or 0)), bool(labels))
    if unknown := [name for name in labels if name not in names]:
        raise ConfigError(
            f"labels: the run has no class {_quoted(unknown)}; its label_names are {_quoted(names)}"
        )
    numbers = tuple(names.index(name) for name in labels)
    if numbers != tuple(range(len(labels))):
        log.warning("labels.order run=%s effect=%s", _quoted(names), "mapped by name")
    return Classes(labels, numbers, is_own=True)


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more
