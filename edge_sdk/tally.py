"""What the measured importance of a round's steps adds up to, on a device without torch.

Counts as `importance.Meter` does, which also measures; numbers come from a graph here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import get_args

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.importance import REFERENCE_PERIODS, Form


class Tally:
    """Importance of each weight: added up over a step's micro-batches, averaged over steps."""

    def __init__(self, weights: Iterable[str], form: Form = "free", every: int = 0) -> None:
        """Count for *weights* at every *every*-th step, `reference` at every second of these.

        Raises:
            ConfigError: there is no such form, or *every* is negative.
        """
        if form not in get_args(Form) or every < 0:
            raise ConfigError(f"importance: {form!r} every {every} steps is not possible")
        self.weights, self.form = tuple(weights), form
        self._every = every * (REFERENCE_PERIODS if form == "reference" else 1)
        self._raw: dict[str, float] = {}
        self._found: dict[str, tuple[float, int]] = {}

    def is_due(self, step: int) -> bool:
        """Whether *step* is measured."""
        return bool(self._every) and step % self._every == 0

    def add(self, name: str, value: float) -> None:
        """Take in one micro-batch's share of a weight's importance."""
        self._raw[name] = self._raw.get(name, 0.0) + value

    def close_step(self, step: int) -> None:
        """Take the step in, if it was measured; one that is not finite is no measurement."""
        raw, self._raw = self._raw, {}
        if not self.is_due(step) or not all(map(math.isfinite, raw.values())):
            return
        for name in self.weights:
            total, count = self._found.get(name, (0.0, 0))
            self._found[name] = (total + abs(raw.get(name, 0.0)), count + 1)

    def take(self) -> dict[str, float]:
        """Mean importance per measured step since the last call."""
        found, self._found = self._found, {}
        return {name: total / count for name, (total, count) in found.items()}

    def forget(self) -> None:
        """Drop what has been measured."""
        self._raw, self._found = {}, {}

    def state(self) -> dict[str, np.ndarray]:
        """What `take` would give, as sum and count."""
        return {name: np.array(found, np.float64) for name, found in self._found.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self.forget()
        self._found = {n: (float(s[0]), int(s[1])) for n, s in state.items() if n in self.weights}
