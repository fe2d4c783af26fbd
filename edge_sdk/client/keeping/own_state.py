"""What a device has learned under one plan: taken over, saved, brought back and handed in.

Files are written in `checkpoints.py`; when, says `participant.py`.
"""

from __future__ import annotations

from edge_sdk.client.checkpoints import LocalState
from edge_sdk.held_states import HeldStates
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.exchange import Known, finer, refined
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import RoundStart
from edge_sdk.protocol.tensors import Shape, check_shapes
from edge_sdk.runtime.training_state import TrainingState

FACTOR_ENDINGS = (".A", ".B", ".U", ".V")


class OwnState:
    """Adapters, optimizer and head of a plan, with what the coordinator knows of them."""

    def __init__(
        self,
        state: TrainingState,
        files: LocalState,
        known: Known | None,
        held: HeldStates | None,
    ) -> None:
        """Keep *state*.

        Args:
            state: What is trained.
            files: Where it is saved.
            known: What the coordinator knows of the adapters; None: that is all there is to know.
            held: What the coordinator holds of the samples as well, where it holds anything.
        """
        self._state, self._files, self._known, self._held = state, files, known, held

    def begin_round(self, start: RoundStart, tensors: dict[str, Array]) -> bool:
        """Stand at the start of a round; False where the checkpoint for that cannot be used.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._files.forget_after(start.stamp.step)
        if self._held is not None:
            self._held.begin_round(start.stamp.round, start.stamp.step)
        if start.restore_step >= 0:
            return self._restore(start.restore_step)
        self._apply(start, tensors)
        self._state.begin_round()
        self._write(start.stamp.step)
        if self._held is not None:
            self._held.commit(start.stamp.step)
        return True

    def save(self, step: int, *, goes_on: bool = False) -> None:
        """Save, in mid-round, what is there at the start of *step*.

        Args:
            step: The step; none of its gradients has been applied.
            goes_on: Whether what has been sent of it already stays sent.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._write(step)
        if self._held is not None:
            self._held.commit(step, goes_on=goes_on, may_fail=True)

    def _write(self, step: int) -> None:
        known = {} if self._known is None else self._known.state()
        self._files.save(step, self._state.checkpoint() | known)

    def end_round(self, step: int) -> dict[str, TensorOut]:
        """Return what the coordinator is to know of factors and head; keep what it is not told.

        Raises:
            StorageError: the folder cannot be written.
        """
        state, known = self._state, self._known
        pairs, codec = state.adapters.pairs(), "float32"
        if known is not None:
            pairs, codec = known.changes(pairs), known.codec
            known.told(pairs)
        tensors: dict[str, TensorOut] = {}
        for name, pair in pairs.items():
            tensors |= {f"{name}.A": (pair.a_RI, codec), f"{name}.B": (pair.b_OR, codec)}
        tensors |= {name: (value, "float32") for name, value in state.head().items()}
        left = state.moments()
        if known is not None:
            left |= finer(state.adapters.pairs(), known.pairs)
        self._files.save_moments(step, left)
        return tensors

    # ---- what a round begins with ----

    def _restore(self, step: int) -> bool:
        """Go back to the checkpoint of *step*; return whether it could be used."""
        state = self._state
        pairs = state.adapters.pairs().items()
        own = {f"own:{n}.{f}": v for n, p in pairs for f, v in zip("AB", p, strict=True)}
        head = {f"head:{name}": value for name, value in state.head().items()}
        known = {} if self._known is None else {f"known:{n[4:]}": v for n, v in own.items()}
        held = self._files.try_load(step, {n: v.shape for n, v in (own | head | known).items()})
        if held is None:
            return False
        state.restore(held)
        if self._known is not None:
            self._known.load_state(held)
        return True

    def _apply(self, start: RoundStart, tensors: dict[str, Array]) -> None:
        """Take over what the aggregation hands out."""
        state = self._state
        self._check(start, tensors)
        # Factors and residual come with the message; moments are best where they were left.
        left = self._files.moments(start.stamp.step) if start.is_full else {}
        if start.restarts:
            state.load_moments({})
        elif start.is_full:
            state.load_moments(left)
        own = {name[:-2] for name in tensors if name.endswith(".A")}
        changed = {name[:-2] for name in tensors if name.endswith(".V")}
        residual = {n: Factors(tensors[f"{n}.U"], tensors[f"{n}.V"]) for n in changed}
        pairs = {n: Pair(tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in own}
        if self._known is not None:
            state.set_residual(self._given(self._known, start, pairs, residual, left))
        else:
            state.adapters.load_pairs(pairs)
            self._set_residual(start, residual)
        state.load_head({n: v for n, v in tensors.items() if n[-2:] not in FACTOR_ENDINGS})

    def _set_residual(self, start: RoundStart, residual: dict[str, Factors]) -> None:
        if start.is_full:
            self._state.set_residual(residual)
        else:
            self._state.merge_change(residual)

    def _given(
        self,
        known: Known,
        start: RoundStart,
        pairs: dict[str, Pair],
        given: dict[str, Factors],
        left: dict[str, Array],
    ) -> dict[str, Factors]:
        """Take factors over; return the residual where a device is given but a part."""
        adapters = self._state.adapters
        if start.is_full:
            adapters.load_pairs(refined(pairs, left))
            known.begin(pairs, given)
        else:
            adapters.load_pairs(known.move(adapters.pairs(), pairs))
            known.add(given, start.most_rank)
        known.kept = start.kept
        return known.residual(adapters.scale)

    def _check(self, start: RoundStart, tensors: dict[str, Array]) -> None:
        """Refuse factors and parameters of another size than ours; the residual's rank is free."""
        state = self._state
        factors: dict[str, Shape] = {}
        for name, pair in state.adapters.pairs().items():
            factors |= {f"{name}.A": pair.a_RI.shape, f"{name}.B": pair.b_OR.shape}
        head = {name: value.shape for name, value in state.head().items()}
        own = {n: v for n, v in tensors.items() if not n.endswith((".U", ".V"))}
        check_shapes(start, own, factors | head, factors if start.is_full else ())
