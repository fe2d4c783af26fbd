"""What each device is told to hold at the start of a round: everything, a change, or its own past.

Pure: it knows the ledger and the last aggregation, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from coordinator.aggregation.ledger import Ledger, RoundResult
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.targets import ModelFacts
from edge_sdk.protocol.fragments import SharedTensors, TensorOut
from edge_sdk.protocol.messages import RoundStart, Stamp
from edge_sdk.protocol.plan import Plan


class RoundStartBuilder:
    """Remembers who holds the state of the last aggregation, and what it changed."""

    def __init__(self, ledger: Ledger, facts: ModelFacts) -> None:
        self._ledger, self._facts = ledger, facts
        self.current: set[str] = set()
        """Devices that hold the end of the last round and need only its changes."""
        self._result: RoundResult | None = None
        self._shared: dict[Hashable, SharedTensors] = {}
        """What all are sent of the last round that hold the same: by split, by the ranks of new
        factors, and by whether the head is part of it."""

    def round_ended(self, result: RoundResult, members: set[str]) -> None:
        """Take in the result of a round; *members* took part from its beginning to its end."""
        self._result, self.current, self._shared = result, set(members), {}

    def forget(self, device: str | None = None) -> None:
        """Assume nothing any more about what a device, or every device, holds."""
        self.current = self.current - {device} if device is not None else set()

    def message(
        self, stamp: Stamp, end_step: int, plan: Plan, held: tuple[int, ...], *, evaluate: bool
    ) -> tuple[RoundStart, dict[str, TensorOut]]:
        """Return the RoundStart of one device, with its tensors."""
        device = stamp.device
        own = self._ledger.enrol(device, plan.ranks)
        if device in self.current and self._result is not None:
            result = self._result
            tensors = self._changes(result, device, plan)
            is_full, restarts = False, result.restarts
        else:
            weights = self._facts.weights(0, plan.split)
            held_already = self._residuals(device, weights, own)
            if stamp.step in held:
                return RoundStart(
                    stamp=stamp,
                    end_step=end_step,
                    is_full=False,
                    restore_step=stamp.step,
                    evaluate=evaluate,
                ), {}
            tensors = _tensors(own, held_already, "float32") | _head(self._ledger.head, plan)
            is_full, restarts = True, self._ledger.restarts
        kept, most_rank = self._kept(device, plan.split)
        return RoundStart(
            stamp=stamp,
            end_step=end_step,
            is_full=is_full,
            restarts=restarts,
            evaluate=evaluate,
            kept=kept,
            most_rank=most_rank,
        ), tensors

    def _changes(self, result: RoundResult, device: str, plan: Plan) -> dict[str, TensorOut]:
        """Return what a device of the last round is sent; nobody may change the dict.

        With a thousand devices most are sent the same, which is put together and encoded once.
        """
        accounts, own = self._ledger.accounts, result.replaced.get(device, {})
        split, head = plan.split, _head(result.head, plan)
        if accounts is not None:
            handout = result.handouts[device]
            return self._sent(handout.moves, handout.changes, split, accounts.codec) | head
        # Factors that are handed out depend on nothing but their rank.
        key = split, bool(head), tuple((n, pair.a_RI.shape[-2]) for n, pair in own.items())
        if key not in self._shared:
            sent = self._sent(own, result.changes_for(device), split) | head
            self._shared[key] = SharedTensors(sent)
        return self._shared[key]

    def _sent(
        self,
        own: Mapping[str, Pair],
        changes: Mapping[str, Factors],
        split: int,
        codec: str = "float32",
    ) -> dict[str, TensorOut]:
        """Return new factors, and the changes of a device's blocks."""
        weights = set(self._facts.weights(0, split))
        return _tensors(own, {n: f for n, f in changes.items() if n in weights}, codec)

    def _residuals(
        self, device: str, weights: list[str], own: Mapping[str, Pair]
    ) -> dict[str, Factors]:
        """Return what makes dW of own factors; with accounts, what counts as given to the device.

        A device that goes back to a checkpoint of its own has been given the same, in a message
        that may be in no checkpoint of ours.
        """
        accounts = self._ledger.accounts
        if accounts is None:
            return self._ledger.residuals(device, weights)
        return accounts.open(device, weights, self._ledger.totals, own)

    def _kept(self, device: str, split: int) -> tuple[float, int]:
        """Return `kept` and `most_rank` of a RoundStart."""
        accounts = self._ledger.accounts
        if accounts is None:
            return 0.0, 0
        weights = self._facts.weights(0, split)
        pairs = self._ledger.pairs[device]
        return accounts.kept(device), accounts.most_rank(self._ledger.totals, weights, pairs)


def _head(head: Mapping[str, Array], plan: Plan) -> dict[str, TensorOut]:
    """Return the trained head as it travels to a device that holds it."""
    return {name: (value, "float32") for name, value in head.items()} if plan.tail else {}


def _tensors(
    pairs: Mapping[str, Pair], residual: Mapping[str, Factors], codec: str
) -> dict[str, TensorOut]:
    tensors: dict[str, TensorOut] = {}
    for name, pair in pairs.items():
        tensors |= {f"{name}.A": (pair.a_RI, codec), f"{name}.B": (pair.b_OR, codec)}
    for name, factors in residual.items():
        tensors |= {f"{name}.V": (factors.a_RI, codec), f"{name}.U": (factors.b_OR, codec)}
    return tensors
