"""What an audit of privacy tries, on which data, and what it calls little enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_sdk.data.rows import DataConfig
from edge_sdk.protocol.codecs import float_codecs
from edge_sdk.protocol.residual import RESIDUAL

# The most exact first; `residual` is what is held after whole states and changes have come.
CODECS = (*reversed(float_codecs()), RESIDUAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """What `coordinator audit-privacy` does."""

    data: DataConfig = field(default_factory=DataConfig)
    """The sample: texts of the kind that devices hold, of which the attacks try to recover some."""
    model: str | None = None
    """Folder of a transformers model, or a Hugging Face id: devices run its blocks as they are."""
    run: Path | None = None
    """Folder of a run instead: its model, with what its newest checkpoint has learned."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What the model is for; that of the run where one is named."""
    public: tuple[str, ...] = ()
    """Files from which the attacker learns, read as `data` is; empty: a half of the sample, which
    makes the attacker one that knows texts of the very kind."""
    codecs: tuple[str, ...] = ()
    """How hidden states and gradients travel; empty: in every way there is."""
    splits: tuple[int, ...] = ()
    """Blocks on the device; empty: every number of them that the model allows."""
    share: float = 0.5
    """Share of the tokens that may be recovered at most where a split is to be suggested."""
    tokens: int = 2000
    """Most tokens to recover; whole texts are taken until they are as many."""
    public_tokens: int = 20_000
    """Most tokens to learn from."""
    searched: int = 64
    """Most tokens, of the shortest texts, that are searched one after the other for each split and
    codec; it takes the longest of all attacks. 0: none."""
    seed: int = 0
    """What decides which texts are attacked, and how the inverter begins."""

    def __post_init__(self) -> None:
        for name in self.codecs:
            if name not in CODECS:
                raise ValueError(f"codecs: {name!r} is not one of {', '.join(CODECS)}")
        if any(split < 1 for split in self.splits):
            raise ValueError(f"splits must be at least 1, got {list(self.splits)}")
        for name in ("tokens", "public_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.searched < 0:
            raise ValueError(f"searched must be at least 0, got {self.searched}")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    @property
    def all_codecs(self) -> tuple[str, ...]:
        """The codecs to try, the most exact first."""
        return tuple(name for name in CODECS if name in (self.codecs or CODECS))
