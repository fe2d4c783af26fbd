"""What each device has been given of dW, and what it is given next where less than all travels.

An account is what the device can be relied on to hold. What dW is beyond that stays on it, whole,
until a later round has room; docs/method.md, Aggregation. Pure: it sends nothing, and knows neither
rounds nor reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.exchange import Scale, change_of, moved, product, read_pair, received
from edge_sdk.lora.factors import Factors, leading, norm, stack
from edge_sdk.protocol.codecs import Array, as_read

# Singular values below this share of the largest are smaller than what coding makes of that one.
TOLERANCES = {"float32": 1e-6, "bfloat16": 2.0**-9}
COARSEST_TOLERANCE = 2.0**-8


class Handout(NamedTuple):
    """What a device is given after a round."""

    changes: dict[str, Factors]
    """What is added to all that it was given before, by weight, not yet coded."""
    lag: float
    """Afterwards: |dW - what the device computes with|_F / |dW|_F, all its weights together."""
    moves: Mapping[str, Pair] = MappingProxyType({})
    """What is added to its own factors, not yet coded, where all go on with the same."""


class Accounts:
    """What was given to each device, by weight, as the device has read it."""

    def __init__(
        self,
        codec: str,
        most_ranks: Callable[[int], int | None],
        scale: Scale,
        *,
        keeps_all: bool = False,
    ) -> None:
        """Open no account yet.

        Args:
            codec: How changes travel.
            most_ranks: Rank of a device's own adapter -> ranks of a change; None for all of them.
            scale: (weight, rank) -> the factor in front of B A.
            keeps_all: Whether all go on with the same factors, which count whole for a device;
                else with their own, of which a share is in dW.
        """
        self.codec, self._most_ranks, self._scale = codec, most_ranks, scale
        self._keeps_all = keeps_all
        self.given: dict[str, dict[str, Factors]] = {}
        self._kept: dict[str, float] = {}

    def copy(self) -> Accounts:
        """Return accounts that go their own way from here."""
        other = copy(self)
        other.given, other._kept = dict(self.given), dict(self._kept)
        return other

    def kept(self, device: str) -> float:
        """Return the share of its own product that a device goes on to compute with."""
        return 1.0 if self._keeps_all else self._kept.get(device, 0.0)

    def most_rank(
        self, totals: Mapping[str, Factors], weights: Iterable[str], pairs: Mapping[str, Pair]
    ) -> int:
        """Return in how many ranks a device with own factors *pairs* holds what it was given."""
        most = max((totals[weight].rank for weight in weights if weight in totals), default=0)
        if not self._keeps_all:
            return most  # its own product is a part of dW, and adds no ranks to what is given
        return most + max((pair.a_RI.shape[-2] for pair in pairs.values()), default=0)

    def open(
        self,
        device: str,
        weights: Iterable[str],
        totals: Mapping[str, Factors],
        pairs: Mapping[str, Pair],
    ) -> dict[str, Factors]:
        """Return what *device* has been given of *weights*; where that is nothing, all there is.

        What is new depends on the arguments alone, so that it need not be in a checkpoint.
        """
        given = dict(self.given.get(device, {}))
        most = self.most_rank(totals, weights, pairs)
        for weight in weights:
            if weight in totals and weight not in given:
                own = self._own(device, weight, pairs)
                given[weight] = leading(_missing(totals[weight], None, own), most)
        self.given[device] = {weight: given[weight] for weight in weights if weight in given}
        return self.given[device]

    def move(
        self, pairs: Mapping[str, Pair], wanted: Mapping[str, Pair]
    ) -> tuple[dict[str, Pair], dict[str, Pair]]:
        """Return what lets a device hold *wanted* in place of *pairs*, and what it holds then.

        What coding loses of the way is a part of it again after the next round.
        """
        moves = {
            n: change_of(pair, wanted[n]) for n, pair in pairs.items() if wanted[n] is not pair
        }
        read = {n: moved(pairs[n], read_pair(move, self.codec)) for n, move in moves.items()}
        return moves, {**pairs, **read}

    def settle(
        self,
        device: str,
        weights: Iterable[str],
        totals: Mapping[str, Factors],
        pairs: Mapping[str, Pair],
        share: float,
    ) -> Handout:
        """Give a device the most important part of what it lacks.

        Args:
            device: Who was in the round.
            weights: Those of its blocks.
            totals: dW after the round.
            pairs: The device's own factors, as it goes on with them.
            share: Its share of the samples.
        """
        self._kept.setdefault(device, share)
        before, most = self.given.get(device, {}), self.most_rank(totals, weights, pairs)
        tolerance = TOLERANCES.get(self.codec, COARSEST_TOLERANCE)
        given: dict[str, Factors] = {}
        changes: dict[str, Factors] = {}
        lag = size = 0.0
        for weight in weights:
            if weight not in totals:
                continue
            total, own = totals[weight], self._own(device, weight, pairs)
            rank = pairs[weight].a_RI.shape[-2] if weight in pairs else 0
            missing = _missing(total, before.get(weight), own)
            change = leading(missing, self._most_ranks(rank), tolerance)
            if change.rank:
                changes[weight] = change
                read = Factors(*(as_read(array, self.codec) for array in change))
                given[weight] = received(before.get(weight), read, most)
            elif weight in before:
                given[weight] = before[weight]
            lag += norm(_missing(total, given.get(weight), own)) ** 2
            size += norm(total) ** 2
        self.given[device] = given
        return Handout(changes, float(np.sqrt(lag / size)) if size else 0.0)

    def _own(self, device: str, weight: str, pairs: Mapping[str, Pair]) -> Factors | None:
        """Return the part of its own product that a device goes on to compute with."""
        if weight not in pairs:
            return None
        return product(weight, pairs[weight], self._scale, self.kept(device))

    def close(self, device: str) -> None:
        """Forget what a device was given whose own factors are others now."""
        self.given.pop(device, None)

    def close_others(self, devices: Iterable[str]) -> None:
        """Forget what those were given who missed a round: they begin with all there is."""
        self.given = {device: self.given[device] for device in devices if device in self.given}

    # ---- checkpoints ----

    def state(self) -> dict[str, Array]:
        """Return everything as flat arrays, for a checkpoint."""
        state: dict[str, Array] = {f"kept:{d}": np.array(share) for d, share in self._kept.items()}
        for device, given in self.given.items():
            for weight, (u_OR, v_RI) in given.items():
                state |= {f"given:{device}:{weight}.U": u_OR, f"given:{device}:{weight}.V": v_RI}
        return state

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Take over what `state` returned; other entries are passed over."""
        self.given, self._kept = {}, {}
        for key, array in state.items():
            kind, _, rest = key.partition(":")
            if kind == "kept":
                self._kept[rest] = float(array)
            elif kind == "given" and key.endswith(".V"):
                device, _, weight = rest.removesuffix(".V").rpartition(":")
                factors = Factors(state[f"{key[:-1]}U"], array)
                self.given.setdefault(device, {})[weight] = factors


def _missing(total: Factors, given: Factors | None, own: Factors | None) -> Factors:
    """Return dW less what a device has of it, as a stack."""
    has = [term.scaled(-1.0) for term in (given, own) if term is not None]
    return stack([total, *has])
