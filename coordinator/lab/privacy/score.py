"""What was recovered, in shares: tokens at the first try and among ten, and whole texts.

Pure. Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coordinator.lab.privacy.texts import Mask, Numbers, Shares, Texts

TRIES = 10
PROMPTS, COMPLETIONS = "prompts", "completions"
KINDS = (PROMPTS, COMPLETIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How much of some texts one attack gave back."""

    tokens: int
    """Tokens that it tried to recover."""
    top1: float
    """Share of them that its first guess names."""
    top10: float
    """Share of them that are among its first ten."""
    sentences: int
    """Texts (all prompts of a text, or all completions) that these tokens make."""
    exact: float
    """Share of the texts of which each token was guessed at once."""


def ranks_of(scores_NV: npt.NDArray[np.float32], ids_N: Numbers) -> Numbers:
    """Return how many tokens an attack holds for as likely as the true one, or likelier."""
    own_N = scores_NV[np.arange(len(ids_N)), ids_N]
    ranks_N: Numbers = (scores_NV >= own_N[:, None]).sum(1) - 1
    return ranks_N


def recovered(ranks_N: Numbers, texts: Texts, tried_N: Mask | None = None) -> dict[str, Recovery]:
    """Return what an attack with these ranks recovers, prompts and completions apart.

    Args:
        ranks_N: Tokens that it prefers to the true one.
        texts: The texts.
        tried_N: Tokens that it has tried; None: all.
    """
    counts_N = texts.counts_N if tried_N is None else texts.counts_N & tried_N
    found = {}
    for kind, is_kind_N in ((PROMPTS, ~texts.is_target_N), (COMPLETIONS, texts.is_target_N)):
        of_N = counts_N & is_kind_N
        if of_N.any():
            found[kind] = recovery(ranks_N[of_N], texts.sequence_N[of_N])
    return found


def recovery(ranks_N: Numbers, sequence_N: Numbers) -> Recovery:
    """Return shares of tokens, at least one, that stand in the texts *sequence_N*."""
    is_wrong_N = ranks_N > 0
    own = np.unique(sequence_N)
    wrong = np.unique(sequence_N[is_wrong_N])
    return Recovery(
        tokens=len(ranks_N),
        top1=float(np.mean(~is_wrong_N)),
        top10=float(np.mean(ranks_N < TRIES)),
        sentences=len(own),
        exact=1.0 - len(wrong) / len(own),
    )


def by_frequency(shares_V: Shares, texts: Texts) -> dict[str, Recovery]:
    """Return what somebody recovers who always guesses the most frequent tokens."""
    order = np.argsort(-shares_V, kind="stable")
    places_V = np.empty_like(order)
    places_V[order] = np.arange(len(order))
    return recovered(places_V[texts.ids_N], texts)
