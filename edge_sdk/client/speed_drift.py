"""Whether a device still computes and hears as fast as when its plan was made. Pure.

A board that throttles, a power mode that changes, a link that fades: the coordinator should know,
because it plans with the old numbers. It decides itself what is noise and
what is worth a new plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

# A smaller relative change is noise of a busy machine, not worth a message.
LEAST_CHANGE = 0.2


@dataclass
class SpeedDrift:
    """Compute rate and waiting time of a plan's rounds, against those of its first round."""

    _rates: list[float] = field(default_factory=list)
    _waits: list[float] = field(default_factory=list)
    _first: tuple[float, float] | None = None
    _is_due: bool = False
    """Whether the board has changed, so that its speed is told however little that changed."""
    _is_base_off: bool = False
    """Whether the first round's numbers are those of a board that had changed before it."""

    def step(self, num_tokens: int, compute_s: float, wait_s: float) -> None:
        """Note that a step is done."""
        self._rates.append(num_tokens / max(compute_s, 1e-9))
        self._waits.append(wait_s)

    def begin_anew(self) -> None:
        """Measure from here on: the board began or ended throttling, or changed its power mode.

        No change is reported if no earlier speed is known, or if the board is back in the state in
        which its speed was measured.
        """
        if self._first is None and self._rates:
            self._first = median(self._rates), median(self._waits)
        if self._first is None or self._is_base_off:
            self._is_base_off = not self._is_base_off
            self._first, self._rates, self._waits = None, [], []
            return
        self._rates, self._waits = [], []
        self._is_due = True

    def of_new_plan(self) -> SpeedDrift:
        """Return what compares the rounds of a new plan, whose steps take another time."""
        return SpeedDrift(_is_base_off=self._is_base_off or self._is_due)

    def end_round(self) -> tuple[float | None, bool]:
        """End the round.

        Returns:
            The factor of the compute rate, None where it is as it was; and whether
            the device waited so differently that its link should be measured again.
        """
        if not self._rates:
            return None, False
        rate, wait_s = median(self._rates), median(self._waits)
        self._rates, self._waits = [], []
        if self._first is None:
            self._first = rate, wait_s
            return None, False
        least, self._is_due = (0.0 if self._is_due else LEAST_CHANGE), False
        old_rate, old_wait_s = self._first
        is_other_rate = abs(rate - old_rate) > least * old_rate
        is_other_wait = abs(wait_s - old_wait_s) > 2 * LEAST_CHANGE * max(old_wait_s, 1e-3)
        if is_other_rate or is_other_wait:
            self._first = (
                rate if is_other_rate else old_rate,
                wait_s if is_other_wait else old_wait_s,
            )
        return (rate / old_rate if is_other_rate else None), is_other_wait
