"""Updates that are joined when there are enough of them, however old the dW that each began from.

FedBuff's form of asynchronous aggregation, of factors: docs/method.md, Rounds without a barrier.
Pure: it knows no network, no engine and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from coordinator.aggregation.ledger import Ledger, Report, RoundResult
from coordinator.aggregation.robust import Robust
from coordinator.aggregation.rules import SERVER, Contribution
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array
from edge_sdk.lora.targets import LoraConfig, ModelFacts


def freshness(staleness: int, power: float) -> float:
    """Return how much of an update counts that so many merges have overtaken: FedBuff's s."""
    return float((1.0 + staleness) ** -power)


def expected_staleness(seconds: Mapping[str, float], size: int) -> dict[str, float]:
    """Return how many merges overtake a tour of each device, when nobody waits for anybody.

    Args:
        seconds: What equally many steps take each device.
        size: Updates of a merge.
    """
    merges_per_s = sum(1.0 / own_s for own_s in seconds.values()) / size
    return {device: own_s * merges_per_s for device, own_s in seconds.items()}


@dataclass(frozen=True)
class BufferedUpdate:
    """What a device has learned in one tour, from the version of dW that it began with."""

    device: str
    version: int
    """Merges that were done when the tour began."""
    before: Mapping[str, Pair]
    """Own factors of that moment."""
    report: Report


@dataclass
class UpdateBuffer:
    """What has come in since the last merge."""

    updates: list[BufferedUpdate] = field(default_factory=list)
    """In the order in which they came."""
    served: dict[int, float] = field(default_factory=dict)
    """Samples that went through the coordinator's own blocks meanwhile, by their device's split."""

    def serve(self, split: int, samples: float) -> None:
        """Note that the coordinator's blocks have learned from samples of a device of *split*."""
        self.served[split] = self.served.get(split, 0.0) + samples

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been learned since the last merge."""
        return not self.updates and not any(self.served.values())

    @property
    def samples(self) -> int:
        """Samples of the updates."""
        return sum(update.report.num_samples for update in self.updates)

    def staleness(self, version: int) -> dict[str, list[int]]:
        """Return how many merges have overtaken each update by now, by device."""
        found: dict[str, list[int]] = {}
        for update in self.updates:
            found.setdefault(update.device, []).append(version - update.version)
        return dict(sorted(found.items()))

    # ---- checkpoints ----

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as flat arrays, for a checkpoint."""
        state: dict[str, np.ndarray] = {
            f"served:{split}": np.array(samples) for split, samples in self.served.items()
        }
        for number, update in enumerate(self.updates):
            at, report = f"update:{number}", update.report
            facts = update.version, report.split, report.num_samples
            state[f"{at}:facts:{update.device}"] = np.array(facts)
            state |= _flat(f"{at}:before", update.before) | _flat(f"{at}:after", report.pairs)
            state |= {f"{at}:head:{name}": value for name, value in report.head.items()}
            state |= {f"{at}:importance:{n}": np.array(v) for n, v in report.importance.items()}
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray]) -> UpdateBuffer:
        """Return the buffer whose `state` this is."""
        parts: dict[int, dict[str, dict[str, np.ndarray]]] = {}
        found = cls()
        for key, value in state.items():
            kind, _, rest = key.partition(":")
            if kind == "served":
                found.served[int(rest)] = float(value)
                continue
            number, part, name = rest.split(":", 2)
            parts.setdefault(int(number), {}).setdefault(part, {})[name] = value
        found.served = dict(sorted(found.served.items()))
        found.updates = [_update(own) for _, own in sorted(parts.items())]
        return found


def _flat(prefix: str, pairs: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    named = pairs.items()
    return {f"{prefix}:{n}.{f}": v for n, p in named for f, v in zip("AB", p, strict=True)}


def _update(own: Mapping[str, Mapping[str, np.ndarray]]) -> BufferedUpdate:
    ((device, facts),) = own["facts"].items()
    version, split, samples = map(int, facts)
    before, after = (_pairs(own.get(part, {})) for part in ("before", "after"))
    importance = {name: float(value) for name, value in own.get("importance", {}).items()}
    report = Report(split, samples, after, dict(own.get("head", {})), importance)
    return BufferedUpdate(device, version, before, report)


def _pairs(flat: Mapping[str, np.ndarray]) -> dict[str, Pair]:
    names = [name.removesuffix(".A") for name in flat if name.endswith(".A")]
    return {name: Pair(flat[f"{name}.A"], flat[f"{name}.B"]) for name in names}


@dataclass(frozen=True)
class Merging:
    """How much of each update counts."""

    facts: ModelFacts
    lora: LoraConfig
    power: float
    """The a of s(t) = (1 + t)^-a, by which an update counts less the older its dW is."""

    def merge(
        self, buffer: UpdateBuffer, ledger: Ledger, server: Report, version: int
    ) -> RoundResult:
        """Add what is in *buffer*, and what the coordinator's own blocks have learned, to dW.

        Args:
            buffer: What has come in since the last merge.
            ledger: Holds dW; its factors of the coordinator are those of the last merge.
            server: What the coordinator has by now.
            version: Merges done so far.

        Raises:
            NumericError: what comes of it is not finite; nothing was changed.
        """
        before = ledger.pairs[SERVER]
        found = {
            weight: self.contributions(weight, buffer, before, server, version)
            for weight in self.facts.targets
        }
        screened = ledger.screened(found)
        kept = [u for u in buffer.updates if u.device not in screened.left_out]
        head = self.head(
            UpdateBuffer(kept, buffer.served), ledger.head, server, version, ledger.robust
        )
        return ledger.add(screened, server.pairs, head)

    def contributions(
        self,
        weight: str,
        buffer: UpdateBuffer,
        before: Mapping[str, Pair],
        server: Report,
        version: int,
    ) -> dict[str, Contribution]:
        """Count every sample once: for a device that holds the block, else for the coordinator.

        Args:
            weight: Whose adapters.
            buffer: What has come in.
            before: The coordinator's own factors at the last merge.
            server: What the coordinator has by now.
            version: Merges done so far.
        """
        block = self.facts.block_of(weight)
        served = sum(n for split, n in sorted(buffer.served.items()) if split <= block)
        total = served + sum(u.report.num_samples for u in buffer.updates if u.report.split > block)
        found: dict[str, Contribution] = {}
        if served and weight in server.pairs:
            after = server.pairs[weight]
            scale = self._scale(weight, after)
            found[SERVER] = Contribution(served / total, scale, before[weight], after)
        for name, update in _named(buffer.updates):
            report = update.report
            if weight in report.pairs and report.num_samples:
                after = report.pairs[weight]
                found[name] = Contribution(
                    report.num_samples / total,
                    self._scale(weight, after),
                    update.before[weight],
                    after,
                    freshness(version - update.version, self.power),
                    update.device,
                )
        return found

    def _scale(self, weight: str, pair: Pair) -> float:
        return self.lora.scale(weight, pair.a_RI.shape[-2])

    def head(
        self,
        buffer: UpdateBuffer,
        old: Mapping[str, Array],
        server: Report,
        version: int,
        robust: Robust,
    ) -> dict[str, Array]:
        """Return the trained head: moved towards those that hold one, by how much each counts.

        FedAsync's mixing (arXiv 1903.03934): (1 - w) old + sum_i w_i new_i, w the sum of all w_i.
        """
        holders = {name: u for name, u in _named(buffer.updates) if u.report.head}
        brought = {name: update.report.head for name, update in holders.items()}
        heads = dict(robust.heads(brought, old))
        samples = {name: float(u.report.num_samples) for name, u in holders.items()}
        weight = {n: freshness(version - u.version, self.power) for n, u in holders.items()}
        served = sum(n for _, n in sorted(buffer.served.items()))
        if server.head and served:
            heads[SERVER], samples[SERVER], weight[SERVER] = server.head, served, 1.0
        total = sum(samples.values())
        if not total:
            return dict(old)
        weight = {name: weight[name] * samples[name] / total for name in sorted(heads)}
        kept = 1.0 - sum(weight.values()) if old else 0.0
        whole = kept + sum(weight.values())
        return {
            key: _mixed({n: (weight[n] / whole, heads[n][key]) for n in weight}, old.get(key), kept)
            for key in next(iter(heads.values()))
        }


def _mixed(parts: Mapping[str, tuple[float, Array]], old: Array | None, kept: float) -> Array:
    total = sum(share * array.astype(np.float64) for share, array in parts.values())
    if old is not None and kept > 0.0:
        total = total + kept * old.astype(np.float64)
    return np.asarray(total, dtype=np.float64).astype(np.float32)


def _named(updates: Iterable[BufferedUpdate]) -> list[tuple[str, BufferedUpdate]]:
    """Return the updates by name and number, a device's own in the order in which they came."""
    ordered = sorted(updates, key=lambda update: update.device)  # stable: the order of coming stays
    return [(f"{update.device}#{number:04d}", update) for number, update in enumerate(ordered)]
