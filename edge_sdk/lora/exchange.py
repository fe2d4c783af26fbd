"""What coordinator and device both know of a device's adapters, where less than all is told.

Factors go up as changes against what the coordinator has of them, and what the aggregation makes of
all comes down as the leading ranks of what the device lacks, both in a codec. What rounding and
ranks leave out is in no message, and so it is still a difference in the next round. Both sides add
up what was *read*, number by number, and therefore know the same; docs/method.md, Aggregation.

Knows no network and no aggregation rule.

Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors, compress, stack
from edge_sdk.protocol.codecs import as_read

Scale = Callable[[str, int], float]
"""(weight, rank) -> the factor in front of its B A."""


def moved(known: Pair, change: Pair) -> Pair:
    """Return the factors that a change makes of those that were known."""
    return Pair(*(old + new for old, new in zip(known, change, strict=True)))


def change_of(known: Pair, wanted: Pair) -> Pair:
    """Return what makes *wanted* of the factors that are known."""
    return Pair(*(new - old for old, new in zip(known, wanted, strict=True)))


def read_pair(pair: Pair, codec: str) -> Pair:
    """Return factors as they are read after they have travelled."""
    return Pair(*(as_read(array, codec) for array in pair))


def received(before: Factors | None, change: Factors, most_rank: int) -> Factors:
    """Return what a device has been given of a weight, *change* included, in *most_rank* ranks.

    What more ranks would hold is cut off on both sides alike, and counts as not given.
    """
    sum_ = change if before is None else stack([before, change])
    return sum_ if sum_.rank <= most_rank else compress(sum_, most_rank)[0]


def product(weight: str, pair: Pair, scale: Scale, share: float) -> Factors:
    """Return share s B A, which a device adds to a weight by itself."""
    rank = pair.a_RI.shape[-2]
    return Factors(pair.b_OR * np.float32(scale(weight, rank) * share), pair.a_RI)


class Known:
    """What the coordinator knows of a device: the device's own record of it."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        """How changes travel, in both directions."""
        self.pairs: dict[str, Pair] = {}
        """The own factors as the coordinator has them; the device's own may be finer."""
        self.received: dict[str, Factors] = {}
        """The sum of all that the coordinator has given, by weight."""
        self.kept = 0.0
        """Share of the own product that stays where the device computes with it."""

    # ---- up ----

    def changes(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """Return what the coordinator is to be told, so that it knows *pairs*."""
        return {name: change_of(self.pairs[name], pair) for name, pair in pairs.items()}

    def told(self, changes: Mapping[str, Pair]) -> None:
        """Note that *changes* are on their way to the coordinator, which reads them coded."""
        for name, change in changes.items():
            self.pairs[name] = moved(self.pairs[name], read_pair(change, self.codec))

    # ---- down ----

    def begin(self, pairs: Mapping[str, Pair], given: Mapping[str, Factors]) -> None:
        """Take over all that the coordinator knows of this device, and has given to it."""
        self.pairs, self.received = dict(pairs), dict(given)

    def add(self, changes: Mapping[str, Factors], most_rank: int) -> None:
        """Take in what the coordinator has given now."""
        for name, change in changes.items():
            self.received[name] = received(self.received.get(name), change, most_rank)

    def move(self, own: Mapping[str, Pair], moves: Mapping[str, Pair]) -> dict[str, Pair]:
        """Take in how own factors change; return those that do, with what was not told of *own*."""
        told = self.pairs
        self.pairs = told | {name: moved(told[name], move) for name, move in moves.items()}
        return {name: _completed(self.pairs[name], own[name], told[name]) for name in moves}

    def residual(self, scale: Scale) -> dict[str, Factors]:
        """Return what completes the own adapters: what was given, less what they add themselves.

        What was given is from then on a part of what this returns, and takes no memory of its own.
        """
        found = {}
        for name, given in self.received.items():
            terms = [given]
            if name in self.pairs and self.kept != 1.0:
                terms.append(product(name, self.pairs[name], scale, self.kept - 1.0))
            b_OR, a_RI = found[name] = stack(terms)
            rank = given.rank
            self.received[name] = Factors(b_OR[..., :rank], a_RI[..., :rank, :])
        return found

    # ---- checkpoints ----

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as flat arrays, for a checkpoint."""
        state = {"kept": np.array(self.kept)}
        for name, (a_RI, b_OR) in self.pairs.items():
            state |= {f"known:{name}.A": a_RI, f"known:{name}.B": b_OR}
        for name, (u_OR, v_RI) in self.received.items():
            state |= {f"received:{name}.U": u_OR, f"received:{name}.V": v_RI}
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned; other entries are passed over."""
        self.kept = float(state["kept"])
        known = [key[len("known:") : -2] for key in state if _is(key, "known:", ".A")]
        self.pairs = {n: Pair(state[f"known:{n}.A"], state[f"known:{n}.B"]) for n in known}
        given = [key[len("received:") : -2] for key in state if _is(key, "received:", ".V")]
        self.received = {
            n: Factors(state[f"received:{n}.U"], state[f"received:{n}.V"]) for n in given
        }


def _is(key: str, prefix: str, ending: str) -> bool:
    return key.startswith(prefix) and key.endswith(ending)


# ---- a device that ends between its upload and the next round ------------------------------------


def finer(pairs: Mapping[str, Pair], known: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    """Return own factors for the device's disk, and those that the coordinator knows of them."""
    state: dict[str, np.ndarray] = {}
    for name, (a_RI, b_OR) in pairs.items():
        state |= {f"finer:{name}.A": a_RI, f"finer:{name}.B": b_OR}
        state |= {f"told:{name}.A": known[name].a_RI, f"told:{name}.B": known[name].b_OR}
    return state


def refined(pairs: Mapping[str, Pair], state: Mapping[str, np.ndarray]) -> dict[str, Pair]:
    """Return *pairs* with all that `finer` has kept and the coordinator was not told.

    Factors that are still those it was told of are the own ones to the bit.
    """
    found = dict(pairs)
    for name, pair in pairs.items():
        if any(f"{kind}:{name}.A" not in state for kind in ("finer", "told")):
            continue
        own, told = (
            Pair(state[f"{kind}:{name}.A"], state[f"{kind}:{name}.B"]) for kind in ("finer", "told")
        )
        if own.a_RI.shape == pair.a_RI.shape:
            found[name] = _completed(pair, own, told)
    return found


def _completed(pair: Pair, own: Pair, told: Pair) -> Pair:
    """Return *pair* with what was not told of *own*, which is *own* itself where pair was told."""
    if all(map(np.array_equal, pair, told)):
        return own
    return moved(pair, change_of(told, own))
