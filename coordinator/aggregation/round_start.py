"""What each device is told to hold at the start of a round: everything, a change, or its own past.

Pure: it knows the ledger and the last aggregation, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.aggregation.ledger import Ledger, RoundResult
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.targets import ModelFacts
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import RoundStart, Stamp
from edge_sdk.protocol.plan import Plan


class RoundStartBuilder:
    """Remembers who holds the state of the last aggregation, and what it changed."""

    def __init__(self, ledger: Ledger, facts: ModelFacts) -> None:
        self._ledger, self._facts = ledger, facts
        self.current: set[str] = set()
        """Devices that hold the end of the last round and need only its changes."""
        self._result: RoundResult | None = None

    def round_ended(self, result: RoundResult, members: set[str]) -> None:
        """Take in the result of a round; *members* took part from its beginning to its end."""
        self._result, self.current = result, set(members)

    def forget(self, device: str | None = None) -> None:
        """Assume nothing any more about what a device, or every device, holds."""
        self.current = self.current - {device} if device is not None else set()

    def message(
        self, stamp: Stamp, end_step: int, plan: Plan, held: tuple[int, ...], *, evaluate: bool
    ) -> tuple[RoundStart, dict[str, TensorOut]]:
        """Return the RoundStart of one device, with its tensors."""
        device = stamp.device
        weights = self._facts.weights(0, plan.split)
        own = self._ledger.enrol(device, plan.ranks)
        if device in self.current and self._result is not None:
            result = self._result
            changes = {n: f for n, f in result.changes_for(device).items() if n in weights}
            tensors = _tensors(result.replaced.get(device, {}), changes)
            head = result.head
            start = RoundStart(
                stamp=stamp,
                end_step=end_step,
                is_full=False,
                restarts=result.restarts,
                evaluate=evaluate,
            )
        elif stamp.step in held:
            return RoundStart(
                stamp=stamp,
                end_step=end_step,
                is_full=False,
                restore_step=stamp.step,
                evaluate=evaluate,
            ), {}
        else:
            tensors = _tensors(own, self._ledger.residuals(device, weights))
            head = self._ledger.head
            start = RoundStart(
                stamp=stamp,
                end_step=end_step,
                is_full=True,
                restarts=self._ledger.restarts,
                evaluate=evaluate,
            )
        if plan.tail:
            tensors |= {name: (value, "float32") for name, value in head.items()}
        return start, tensors


def _tensors(pairs: Mapping[str, Pair], residual: Mapping[str, Factors]) -> dict[str, TensorOut]:
    tensors: dict[str, Array] = {}
    for name, pair in pairs.items():
        tensors |= {f"{name}.A": pair.a_RI, f"{name}.B": pair.b_OR}
    for name, factors in residual.items():
        tensors |= {f"{name}.V": factors.a_RI, f"{name}.U": factors.b_OR}
    return {name: (value, "float32") for name, value in tensors.items()}
