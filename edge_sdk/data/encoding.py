"""Segments of text to token ids and labels, each segment as it continues the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Label of a token that carries no loss, as in PyTorch and transformers."""
Span = tuple[int, int]
"""Positions in a text: of the first letter, and of the one after the last."""
# Stands before text that continues another, for tokenizers that begin every text with a blank: a
# sign so rare that no token joins it with the letters after it.
ANCHOR = "\u2603"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is tokenised alone."""

    text: str
    targets: tuple[Span, ...] = ()
    """The parts of it that carry loss, in their order."""

    @staticmethod
    def context(text: str) -> Segment:
        """Return a segment that carries no loss."""
        return Segment(text)

    @staticmethod
    def target(text: str) -> Segment:
        """Return a segment that carries loss throughout."""
        return Segment(text, ((0, len(text)),))

    def pieces(self) -> Iterator[Segment]:
        """Yield segments that carry loss throughout or none."""
        end = 0
        for start, stop in self.targets:
            yield Segment.context(self.text[end:start])
            yield Segment.target(self.text[start:stop])
            end = stop
        yield Segment.context(self.text[end:])


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as tokens."""

    ids: list[int]
    labels: list[int]
    """The ids, IGNORE where there is no loss."""
    is_split: bool
    """Whether the text as a whole has other ids than its segments one after the other."""


class Encoder:
    """Turns segments into ids with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        bos, ids = tokenizer.bos_token_id, self._tokenizer("a", verbose=False)["input_ids"]
        self.bos = bos if bos is not None and ids and ids[0] == bos else None
        """The token that the tokenizer puts before a text; None for nothing."""
        self._has_places = bool(getattr(tokenizer, "is_fast", False))
        self._rust = _rust_of(tokenizer)
        self._anchor = self._find_anchor()

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        return [ids for ids, _ in self._encode(texts)]

    def samples(self, samples: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Return each sample, of which the segments are tokenised alone, as tokens."""
        parted = [self._parts(sample) for sample in samples]
        alone = iter(self._encode_parts(parted))
        together = iter(self.texts([_text(parts) for parts in parted if len(parts) > 1]))
        found = []
        for parts in parted:
            pieces = [next(alone) for _ in parts]
            ids = [token for piece, _ in pieces for token in piece]
            labels = [label for _, piece in pieces for label in piece]
            found.append(Encoded(ids, labels, len(parts) > 1 and next(together) != ids))
        return found

    def _find_anchor(self) -> list[int]:
        """Return the ids of what must go before a continuation; empty where nothing must.

        SentencePiece begins every text with a blank, which a text that continues another lacks.
        """
        anchor, first, later = self.texts([ANCHOR, "a", f"{ANCHOR}a"])
        size = len(anchor)
        return anchor if later[:size] == anchor and later[size:] != first else []

    def _parts(self, sample: Sequence[Segment]) -> list[Segment]:
        """Return the segments that hold text, cut at their targets if tokens have no places."""
        if not self._has_places:
            sample = [piece for segment in sample for piece in segment.pieces()]
        return [part for part in sample if part.text]

    def _encode_parts(
        self, parted: Sequence[Sequence[Segment]]
    ) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of all parts, one after the other."""
        parts = [part for parts in parted for part in parts]
        continues = [index > 0 and bool(self._anchor) for p in parted for index in range(len(p))]
        texts = [ANCHOR * later + part.text for part, later in zip(parts, continues, strict=True)]
        places = any(part.targets not in ((), ((0, len(part.text)),)) for part in parts)
        found = []
        for part, later, (ids, spans) in zip(
            parts, continues, self._encode(texts, places=places), strict=True
        ):
            if later:
                ids, spans = self._without_anchor(part.text, ids, spans)
            found.append((ids, _labels(part, ids, spans)))
        return found

    def _without_anchor(
        self, text: str, ids: list[int], spans: list[Span]
    ) -> tuple[list[int], list[Span]]:
        """Return what belongs to *text* of the tokens of the anchor and *text*."""
        size = len(self._anchor)
        if ids[:size] == self._anchor:
            return ids[size:], [(a - len(ANCHOR), b - len(ANCHOR)) for a, b in spans[size:]]
        return self._encode([text], places=bool(spans))[0]  # the first letters joined the anchor

    def _encode(
        self, texts: Sequence[str], *, places: bool = False
    ) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of each text and, if asked, which letters each stands for."""
        alone = list(dict.fromkeys(texts))  # prompts come again and again
        found = dict(zip(alone, self._encode_each(alone, places=places), strict=True))
        return [found[text] for text in texts]

    def _encode_each(self, texts: list[str], *, places: bool) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        rust = self._rust
        if rust is not None and not places and rust.truncation is None and rust.padding is None:
            encodings = rust.encode_batch_fast(texts, add_special_tokens=False)
            return [(encoding.ids, []) for encoding in encodings]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # we judge lengths ourselves, with the line at hand
            **({"return_offsets_mapping": True} if places else {}),
        )
        spans = encoded["offset_mapping"] if places else [[]] * len(texts)
        return list(zip(encoded["input_ids"], spans, strict=True))


def _rust_of(tokenizer: Any) -> Any:
    """Return what a tokenizer of transformers leaves every text to, so that it can be asked itself.

    That saves what is made of each text beside its ids. None where its class does more than that,
    or it is none of transformers.
    """
    callers = {"__call__", "_encode_plus", "_batch_encode_plus"}
    owners = [kind.__module__ for kind in type(tokenizer).__mro__ if callers & vars(kind).keys()]
    rust = getattr(tokenizer, "backend_tokenizer", None)
    is_plain = all(owner.startswith("transformers.tokenization_utils") for owner in owners)
    splits = getattr(tokenizer, "split_special_tokens", False)
    return rust if is_plain and not splits and hasattr(rust, "encode_batch_fast") else None


def _text(parts: Sequence[Segment]) -> str:
    return "".join(part.text for part in parts)


def _labels(part: Segment, ids: list[int], places: list[Span]) -> list[int]:
    """Return the ids of tokens that hold a letter of a target, IGNORE for others."""
    if not part.targets:
        return [IGNORE] * len(ids)
    if part.targets == ((0, len(part.text)),):
        return ids
    return [
        token if any(a < stop and max(b, a + 1) > start for start, stop in part.targets) else IGNORE
        for token, (a, b) in zip(ids, places, strict=True)
    ]
