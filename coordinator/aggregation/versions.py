"""What each device is told when it begins a tour: the changes of dW since the version that it has.

Where rounds have a barrier, everybody is at the last aggregation or gets everything, and
`round_start.py` does. Pure: it knows the ledger, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coordinator.aggregation.ledger import Ledger, RoundResult
from coordinator.aggregation.round_start import RoundStartBuilder
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors, compress, stack, zero
from edge_sdk.lora.targets import ModelFacts
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import RoundStart, Stamp
from edge_sdk.protocol.plan import Plan


class VersionedStart(RoundStartBuilder):
    """Remembers which version of dW each device holds, and what every merge has changed since."""

    def __init__(self, ledger: Ledger, facts: ModelFacts, most: int) -> None:
        """Tell devices of *ledger*.

        Args:
            ledger: Holds dW, and everybody's own factors.
            facts: The model's weights.
            most: Merges whose changes are kept; who is further behind gets everything.
        """
        super().__init__(ledger, facts)
        self._most = most
        self._made: dict[int, dict[str, Factors]] = {}
        """What led to each version, by weight."""
        self._held: dict[str, int] = {}

    def merged(self, result: RoundResult, version: int) -> None:
        """Take in the merge that led to *version*."""
        self._made[version] = result.changes
        self._made = {v: c for v, c in self._made.items() if v > version - self._most}

    def holds(self, device: str, version: int) -> None:
        """Note that a device goes on from a checkpoint of its own, of that version."""
        self._held[device] = version

    def forget(self, device: str | None = None) -> None:
        """Assume nothing any more about what a device, or every device, holds."""
        if device is None:
            self._held, self._made = {}, {}
        else:
            self._held.pop(device, None)

    def begin(
        self, stamp: Stamp, end_step: int, plan: Plan, schedule_step: int, *, evaluate: bool
    ) -> tuple[RoundStart, dict[str, TensorOut]]:
        """Return the message by which a device begins a tour with the newest dW, with its tensors.

        Args:
            stamp: Whom it is for; its round is the newest version.
            end_step: First step after the tour.
            plan: What the device runs.
            schedule_step: Step of the run's schedule at which the tour stands.
            evaluate: Whether the device is to evaluate first.
        """
        device, version = stamp.device, stamp.round
        weights = self._facts.weights(0, plan.split)
        own = self._ledger.enrol(device, plan.ranks)
        missed = range(self._held.get(device, -1) + 1, version + 1)
        is_full = device not in self._held or not self._made.keys() >= set(missed)
        if is_full:
            tensors = _outgoing(own, self._ledger.residuals(device, weights))
        else:
            tensors = _outgoing({}, self._since(missed, weights, own))
        if plan.tail:
            tensors |= {name: (value, "float32") for name, value in self._ledger.head.items()}
        self._held[device] = version
        start = RoundStart(
            stamp=stamp,
            end_step=end_step,
            is_full=is_full,
            evaluate=evaluate,
            schedule_step=schedule_step,
        )
        return start, tensors

    def _since(
        self, versions: Iterable[int], weights: Iterable[str], own: Iterable[str]
    ) -> dict[str, Factors]:
        """Return the sum of the changes that led to *versions*, by weight.

        A weight with an adapter of the device's own is always among them: what the device has added
        to it itself, and has not come back in a merge, is no part of the newest dW.
        """
        made = [self._made[version] for version in versions]
        found: dict[str, Factors] = {}
        for weight in weights:
            terms = [change[weight] for change in made if weight in change]
            if len(terms) > 1:
                found[weight] = compress(stack(terms), cancels=True)[0]
            elif terms or weight in own:
                found[weight] = terms[0] if terms else zero(*self._facts.targets[weight])
        return found


def _outgoing(pairs: Mapping[str, Pair], residual: Mapping[str, Factors]) -> dict[str, TensorOut]:
    own = {f"{n}.{f}": v for n, pair in pairs.items() for f, v in zip("AB", pair, strict=True)}
    beside = {f"{n}.{f}": v for n, uv in residual.items() for f, v in zip("UV", uv, strict=True)}
    return {name: (value, "float32") for name, value in (own | beside).items()}
