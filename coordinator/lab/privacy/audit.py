"""Run every attack on a sample: the model, its texts, split by split and codec by codec.

Knows no terminal and no files of its own; what was found is a `AuditReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from coordinator.export.check import trained_slice
from coordinator.export.run import read_trained
from coordinator.lab.privacy.config import AuditConfig
from coordinator.lab.privacy.inverter import Inverter, guesses, inverter_ranks, train_inverter
from coordinator.lab.privacy.labels import find_labels, send_top
from coordinator.lab.privacy.nearest import Vocabulary, nearest_ranks, nearest_tokens, shift_of
from coordinator.lab.privacy.positions import told_by
from coordinator.lab.privacy.report import (
    EMBEDDING,
    INVERTER,
    SEARCH,
    STATE,
    AuditReport,
    Cell,
    LabelCell,
)
from coordinator.lab.privacy.score import by_frequency, recovered, recovery
from coordinator.lab.privacy.search import WIDTHS, find_text, merged
from coordinator.lab.privacy.states import Array, Walk, as_received, error_of, windows
from coordinator.lab.privacy.texts import Numbers, Sample, Texts, make_sample, shares_of
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import RunFolder
from edge_sdk.data.tokenize import ModelLimits
from edge_sdk.errors import ConfigError
from edge_sdk.model.layout import usable_positions
from edge_sdk.model.partition import Slice
from edge_sdk.model.weights import ModelSource, load_tokenizer

# Floating-point operations of one attack at one split beyond which it is left out: on a slow CPU
# these are minutes.
MOST_FLOPS = 2e13
# Codecs that move states by a smaller part of themselves share one inverter.
SAME = 0.01
# Targets that are looked for in gradients, at most; each costs products with all of the head.
MOST_LABELS = 512

Say = Callable[[str], None]


@dataclass
class _Audited:
    """A model whose first blocks a device would run."""

    model: Slice
    source: ModelSource
    tokenizer: Any
    config: AuditConfig
    limits: ModelLimits
    learned: str
    notes: list[str] = field(default_factory=list)

    @property
    def pad_id(self) -> int:
        return int(self.source.config.get_text_config().pad_token_id or 0)

    @property
    def flops_per_token(self) -> float:
        """Operations of all blocks for one token, roughly."""
        return 2.0 * self.model.block_bytes() / 4


def audit(config: AuditConfig, say: Say) -> AuditReport:
    """Try what a curious coordinator could, and return how much of the sample it recovers.

    Args:
        config: What is tried.
        say: Takes a line about each split as it begins.

    Raises:
        ConfigError: the config names no model, or splits that it does not have.
        ModelError: the model cannot be had.
        DataError: the data cannot be used, or is too little.
    """
    audited = _open(config)
    sample = make_sample(audited.config, audited.tokenizer, audited.limits, audited.pad_id)
    splits = _splits(audited)
    shares_V = shares_of(sample.known, audited.model.vocab_size)
    hidden = _Hidden(audited, sample, shares_V)
    cells: list[Cell] = []
    for split in (0, *splits):
        say(f"split {split} of {audited.model.layout.num_blocks}")
        cells += hidden.at(split)
    say("gradients")
    return AuditReport(
        model=str(audited.source.hub_id or audited.source.folder.name),
        learned=audited.learned,
        task=audited.source.task,
        num_blocks=audited.model.layout.num_blocks,
        share=config.share,
        seed=config.seed,
        texts=int(sample.attacked.sequence_N[-1]) + 1,
        tokens=int(sample.attacked.counts_N.sum()),
        known_tokens=int(sample.known.counts_N.sum()),
        known_from=sample.source,
        baseline=by_frequency(shares_V, sample.attacked),
        cells=tuple(cells),
        labels=_labels(audited, hidden.attacked, sample.attacked),
        told=told_by(sample.attacked.batches) if audited.model.has_local_tail else None,
        notes=tuple(dict.fromkeys(audited.notes)),
    )


# ---- what is audited ----


def _open(config: AuditConfig) -> _Audited:
    if (config.model is None) == (config.run is None):
        raise ConfigError("audit-privacy: give either --model FOLDER or --run RUN")
    if config.run is None:
        assert config.model is not None
        names = config.data.labels
        if config.task == "sequence-classification" and len(names) < 2:
            raise ConfigError("data.labels: name the classes, at least 2, in their order")
        source = ModelSource(config.model, config.task, num_labels=len(names))
        source.load_whole(config.seed)
        model, learned = trained_slice(source, {}, {}), "nothing"
    else:
        run = read_config(config.run)
        if run.trained_by == "coordinator":
            raise ConfigError(f"--run: {config.run} had no devices, whose data could be seen")
        trained = read_trained(RunFolder.open(config.run), run)
        if not trained.learned:
            raise ConfigError(f"--run: {config.run} has not finished a round yet")
        source, names = trained.source, run.label_names
        learned = f"{trained.facts.rounds} rounds of run {config.run.name}"
        config = replace(config, task=run.task)
        model = trained_slice(source, trained.learned, trained.head)
    limits = ModelLimits(
        vocab_size=model.vocab_size,
        max_positions=usable_positions(source.config, source.task),
        num_labels=len(names) or None,
        label_names=tuple(names),
    )
    return _Audited(model, source, load_tokenizer(source.folder), config, limits, learned)


def _splits(audited: _Audited) -> tuple[int, ...]:
    """Return the splits to try; with all blocks on a device no hidden state leaves it."""
    layout = audited.model.layout
    possible = tuple(cut for cut in layout.cuts if cut < layout.num_blocks)
    wanted = audited.config.splits or possible
    if wrong := [split for split in wanted if split not in possible]:
        raise ConfigError(
            f"splits: {wrong[0]} is not one of {', '.join(map(str, possible))} (where the model "
            "can be cut)"
        )
    if layout.needs_ids:
        audited.notes.append(
            "later blocks of this model need the token ids, which travel with labels: server"
        )
    return tuple(sorted(set(wanted)))


# ---- hidden states ----


class _Hidden:
    """The attacks on hidden states, from one split to the next."""

    def __init__(self, audited: _Audited, sample: Sample, shares_V: Any) -> None:
        self._audited, self._sample, self._shares_V = audited, sample, shares_V
        self.attacked = Walk(audited.model, sample.attacked.batches)
        self._known = Walk(audited.model, sample.known.batches)
        first = int(np.bincount(sample.known.ids_N[sample.known.place_N == 0]).argmax())
        self._vocabulary = Vocabulary(audited.model, first)
        longest = max(batch.input_ids.shape[1] for batch in sample.known.batches)
        longest = max(longest, *(batch.input_ids.shape[1] for batch in sample.attacked.batches))
        self._offsets_TD = self._vocabulary.place_offsets(longest)
        self._searches = self._can_search()

    def at(self, split: int) -> list[Cell]:
        """Return what each attack recovers at *split*, with every codec; at 0 with the first."""
        self.attacked.to(split)
        self._known.to(split)
        if self._has_states():
            self._vocabulary.to(split)
        codecs = self._audited.config.all_codecs[: None if split else 1]
        own: dict[str, Inverter] = {}
        return [cell for codec in codecs for cell in self._with(split, codec, own)]

    def _with(self, split: int, codec: str, own: dict[str, Inverter]) -> list[Cell]:
        attacked, known = self._sample.attacked, self._sample.known
        received = as_received(self.attacked.states, attacked.batches, codec)
        learned = as_received(self._known.states, known.batches, codec)
        tables = {EMBEDDING: self._vocabulary.embeddings_VD}
        if split and self._has_states():
            tables[STATE] = self._vocabulary.states_VD
        aimed = {name: self._aimed(received, learned, table) for name, table in tables.items()}
        found = {
            name: recovered(nearest_ranks(aimed[name], attacked.ids_N, table), attacked)
            for name, table in tables.items()
        }
        if split:
            error = error_of(self._known.states, learned, known)
            inverter = self._inverter(codec, learned, error, own)
            seen = windows(received, attacked)
            found[INVERTER] = recovered(inverter_ranks(inverter, seen, attacked.ids_N), attacked)
            if self._searches:
                best = guesses(inverter, seen, WIDTHS[-1])
                if STATE in tables:
                    near = nearest_tokens(aimed[STATE], tables[STATE], WIDTHS[-1])
                    best = merged(best, near)
                found[SEARCH] = self._search(split, received, best, error)
        return [Cell(split=split, codec=codec, attack=a, found=f) for a, f in found.items()]

    def _aimed(self, received: Sequence[Array], learned: Sequence[Array], table: Array) -> Array:
        """Return states less what sets them apart from *table*, as far as known texts tell."""
        attacked, known = self._sample.attacked, self._sample.known
        states_ND = known.flat(learned) - self._offsets_TD[known.place_N]
        shift_D = shift_of(states_ND, known.ids_N, table)
        found: Array = attacked.flat(received) - self._offsets_TD[attacked.place_N] - shift_D
        return found

    def _inverter(
        self, codec: str, learned: Sequence[Array], error: float, own: dict[str, Inverter]
    ) -> Inverter:
        """Return one that has seen what this codec makes of states, or one that hardly differs."""
        known = self._sample.known
        size = float(np.sqrt(np.mean(np.sum(known.flat(self._known.states) ** 2, axis=1))))
        key = "" if error < SAME * size else codec
        if key not in own:
            own[key] = train_inverter(
                windows(learned, known),
                known.ids_N,
                self._vocabulary.embeddings_VD,
                self._shares_V,
                self._audited.config.seed,
            )
        return own[key]

    def _search(
        self, split: int, received: Sequence[Array], candidates_NK: Numbers, error: float
    ) -> Any:
        attacked, model = self._sample.attacked, self._audited.model
        ranks_N = np.zeros(len(attacked.ids_N), np.int64)
        tried_N = np.zeros(len(attacked.ids_N), np.bool_)
        flat_ND = attacked.flat(received)
        for own_N in _shortest(attacked, self._audited.config.searched):
            tokens = find_text(model, split, flat_ND[own_N], candidates_NK[own_N], error)
            # Only the first guess is known: a wrong one counts as none of ten.
            ranks_N[own_N] = np.where(attacked.ids_N[own_N] == tokens, 0, model.vocab_size)
            tried_N[own_N] = True
        return recovered(ranks_N, attacked, tried_N)

    def _can_search(self) -> bool:
        audited, config = self._audited, self._audited.config
        if config.searched == 0:
            audited.notes.append("search: not tried (--search 0); it is the strongest attack here")
            return False
        if config.task != "causal-lm":
            audited.notes.append("search: not tried, states depend on what follows a token")
            return False
        texts = self._sample.attacked
        prefixes = sum(len(own) ** 2 / 2 for own in _shortest(texts, config.searched))
        return self._affords(SEARCH, prefixes * WIDTHS[0])

    def _has_states(self) -> bool:
        return self._affords(STATE, 2.0 * self._audited.model.vocab_size)

    def _affords(self, attack: str, tokens: float) -> bool:
        flops = tokens * self._audited.flops_per_token
        if flops > MOST_FLOPS:
            self._audited.notes.append(
                f"{attack}: not tried, it takes about {flops:.1e} operations at each split"
            )
        return flops <= MOST_FLOPS


def _shortest(texts: Texts, most: int) -> list[Numbers]:
    """Return where the tokens of the shortest texts stand, until they are *most*."""
    lengths = np.bincount(texts.sequence_N)
    found, total = list[Numbers](), 0
    for sequence in np.argsort(lengths, kind="stable"):
        if total >= most:
            break
        found.append(np.flatnonzero(texts.sequence_N == sequence))
        total += int(lengths[sequence])
    return found


# ---- gradients ----


def _labels(audited: _Audited, walk: Walk, texts: Texts) -> tuple[LabelCell, ...]:
    """Return what the gradients of each codec tell of targets."""
    walk.to(audited.model.layout.num_blocks)
    found = []
    for codec in audited.config.all_codecs:
        ranks, owners, total = list[Numbers](), list[Numbers](), 0
        for index, (hidden, batch) in enumerate(zip(walk.states, texts.batches, strict=True)):
            if total >= MOST_LABELS:
                break
            sent = send_top(audited.model, hidden, batch, codec)
            own = find_labels(audited.model, sent, batch)
            if own is None:
                audited.notes.append("gradients: not tried, the head is none that is known")
                return ()
            rows = np.arange(len(batch.lengths)) if batch.labels.ndim == 1 else _rows(batch)
            counts = ~np.isin(sent.labels, [*texts.special] if batch.labels.ndim > 1 else [])
            ranks.append(own[counts])
            owners.append(rows[counts] + 1000 * index)
            total += int(counts.sum())
        if total:
            one = recovery(np.concatenate(ranks), np.concatenate(owners))
            found.append(LabelCell(codec=codec, found=one))
    return tuple(found)


def _rows(batch: Any) -> Numbers:
    """Return the sequence of each target."""
    rows: Numbers = np.nonzero(batch.predicts)[0]
    return rows
