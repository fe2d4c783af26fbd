"""How far the gradients of labels that stay on a device may move the coordinator's blocks.

The coordinator cannot count such labels, nor compute their loss. But the loss of a step is a mean:
row j of a device's top gradient is g_j / n, with n targets and g_j the gradient of one target's own
loss, so that the norms of all rows of a step add up to at most the largest |g_j|, whatever n is. An
n of 1 instead of 20 makes that sum 20 times what it was. The sum is therefore held against those of
the other devices, each at its largest so far, and what is beyond is scaled down: that is what a
device without many targets could have, and lying gains nothing above it. docs/method.md, Labels
that stay.

Nobody is refused for it: at the start of a run, or with new data, honest gradients are larger.

Legend: B sequences, T positions, D hidden size, W positions that are wanted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_sdk.lora.factors import Array
from edge_sdk.protocol.plan import Place


@dataclass
class _Known:
    """What a device has sent, as far as it counted."""

    step: int = -1
    now: float = 0.0
    """Sum of the norms of all rows of the step."""
    num_now: int = 0
    """Micro-batches in it."""
    largest: float = 0.0
    """Largest sum of an earlier step."""

    def begin(self, step: int) -> None:
        """Go on to a step."""
        if step != self.step:
            self.largest = max(self.largest, self.now)
            self.step, self.now, self.num_now = step, 0.0, 0

    def expected(self, num_micro: int) -> float:
        """Return what a step of the device comes to."""
        whole = self.now * num_micro / self.num_now if self.num_now else 0.0
        return max(self.largest, whole)


class TopGradients:
    """The gradients of one run."""

    def __init__(self, factor: float) -> None:
        """Hold gradients against *factor* times the median of the others; 0 leaves all as it is."""
        self._factor = factor
        self._known: dict[str, _Known] = {}
        self._num_micro: Mapping[str, int] = {}
        self._expected: dict[str, float] = {}
        """What a step of each device comes to."""
        self._sorted: list[float] = []
        """Those of them above 0, in their order."""

    def bounded(
        self, step: int, grads: Mapping[Place, Array], num_micro: Mapping[str, int]
    ) -> dict[Place, Array]:
        """Return the gradients of a wave, none of which is beyond what the others have had.

        Args:
            step: Step that they are of.
            grads: By device and micro-batch, finite: (B, T, D) or (W, D).
            num_micro: Micro-batches of a step, by device; the same object while it says the same.
        """
        if not self._factor:
            return dict(grads)
        if num_micro is not self._num_micro:
            self._look_at_all(num_micro)
        sizes = {place: _size(grads[place]) for place in sorted(grads)}
        for (device, _), size in sizes.items():
            known = self._known.setdefault(device, _Known())
            known.begin(step)
            known.now, known.num_now = known.now + size, known.num_now + 1
        devices = sorted({device for device, _ in sizes})
        for device in devices:
            self._expect(device)
        found = dict(grads)
        limits = {device: self._most(device) for device in devices}
        for device in devices:
            known, most = self._known[device], limits[device]
            if known.now <= most:
                continue
            own = {place: size for place, size in sizes.items() if place[0] == device}
            due = sum(own.values())
            part = max(0.0, most - (known.now - due)) / due
            for place in own:
                found[place] = grads[place] * np.float32(part)
            known.now = most
        for device in devices:
            self._expect(device)
        return found

    def _look_at_all(self, num_micro: Mapping[str, int]) -> None:
        """Compute anew what is expected of everybody, as other devices take part."""
        self._num_micro, self._expected, self._sorted = num_micro, {}, []
        for device in self._known:
            self._expect(device)

    def _expect(self, device: str) -> None:
        """Keep what a step of a device comes to; with many of them a wave looks at its own only."""
        known, before = self._known[device], self._expected.get(device, 0.0)
        if before > 0.0:
            del self._sorted[bisect_left(self._sorted, before)]
        now = known.expected(self._num_micro.get(device, known.num_now))
        self._expected[device] = now
        if now > 0.0:
            insort(self._sorted, now)

    def _most(self, device: str) -> float:
        """Return what a device may have: a multiple of the median of the others."""
        own, others = self._expected[device], self._sorted
        skipped = bisect_left(others, own) if own > 0.0 else len(others)
        num = len(others) - (own > 0.0)
        if num < 2:
            return self._known[device].now
        low, high = (others[at + (at >= skipped)] for at in ((num - 1) // 2, num // 2))
        return self._factor * (low if num % 2 else (low + high) / 2)

    # ---- checkpoints ----

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as flat arrays, for a checkpoint between two steps."""
        known = sorted(self._known.items())
        return {device: np.array(max(one.largest, one.now)) for device, one in known}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self._known = {device: _Known(largest=float(size)) for device, size in state.items()}
        self._num_micro = {}


def _size(grad: Array) -> float:
    """Return the sum of the norms of all rows, in float64."""
    return float(np.linalg.norm(grad.astype(np.float64), axis=-1).sum())
