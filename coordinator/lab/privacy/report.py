"""What an audit found, and what follows for split points; values alone.

Pure: it knows no model and draws nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from coordinator.lab.privacy.positions import Told
from coordinator.lab.privacy.score import COMPLETIONS, PROMPTS, Recovery

EMBEDDING, STATE, INVERTER, SEARCH = "embedding", "state", "inverter", "search"
ATTACKS = {
    EMBEDDING: "the token whose embedding is nearest to the hidden state",
    STATE: "the token whose own hidden state, behind a text's first token, is nearest",
    INVERTER: "a small network that was taught on known texts, and sees the neighbours' states",
    SEARCH: "candidates run through the device's blocks behind what is known, one after the other",
}
"""How hidden states are attacked, the simplest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One attack on the hidden states of one split point, sent with one codec."""

    split: int
    """Blocks on the device; 0: none, the embeddings alone, for comparison."""
    codec: str
    attack: str
    found: dict[str, Recovery]
    """By kind of token: prompts, completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCell:
    """Targets from the gradients of one codec."""

    codec: str
    found: Recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Everything that an audit found."""

    model: str
    learned: str
    """What the device's blocks have learned beyond the model."""
    task: str
    num_blocks: int
    share: float
    """What may be recovered at most where a split is suggested."""
    seed: int
    texts: int
    """Texts that were attacked."""
    tokens: int
    """Their tokens that count: special ones do not."""
    known_tokens: int
    """Tokens from which the attacker has learned."""
    known_from: str
    """Where these come from."""
    baseline: dict[str, Recovery]
    """Who knows nothing but how frequent tokens are."""
    cells: tuple[Cell, ...]
    labels: tuple[LabelCell, ...]
    told: Told | None
    """What named positions tell; None where none are named."""
    notes: tuple[str, ...]
    """What was not tried, and why."""

    @property
    def codecs(self) -> tuple[str, ...]:
        """Codecs that were tried, the most exact first."""
        return tuple(dict.fromkeys(cell.codec for cell in self.cells))

    @property
    def splits(self) -> tuple[int, ...]:
        """Split points that were tried."""
        return tuple(sorted({cell.split for cell in self.cells if cell.split}))

    @property
    def kind(self) -> str:
        """What splits are chosen by: prompts where there are any, as labels tell the others."""
        return PROMPTS if PROMPTS in self.baseline else COMPLETIONS

    def best(self, split: int, codec: str, kind: str) -> Cell | None:
        """Return the attack that recovers most; None where none was tried."""
        own = self._cells(split, codec, kind)
        return max(own, key=lambda cell: cell.found[kind].top1, default=None)

    def _cells(self, split: int, codec: str, kind: str) -> list[Cell]:
        where = (split, codec)
        return [c for c in self.cells if (c.split, c.codec) == where and kind in c.found]

    def least_split(self, codec: str, attacks: Collection[str] = ATTACKS.keys()) -> int:
        """Return the least split from which on *attacks* recover less than `share` with a codec.

        All blocks where there is none: then no hidden state leaves the device.
        """
        found = self.num_blocks
        for split in reversed(self.splits):
            own = self._cells(split, codec, self.kind)
            shares = [cell.found[self.kind].top1 for cell in own if cell.attack in attacks]
            if not shares or max(shares) >= self.share:
                break
            found = split
        return found

    def least_split_of(self, attack: str) -> int | None:
        """Return the same of one attack, for all codecs; None where it was not tried."""
        if not any(cell.attack == attack and cell.split for cell in self.cells):
            return None
        return max(self.least_split(codec, [attack]) for codec in self.codecs)

    @property
    def suggested(self) -> int:
        """The least split that does for every codec that was tried, whatever the attack."""
        return max(map(self.least_split, self.codecs))
