"""Deterministic, length-bucketed batches: which samples a step sees, and their padded arrays.

A pure function of (seed, name, step), so that a run resumes where it stood and a step that is sent
twice is the same step. Knows no tokenizer, thread or device.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.tokenize import Example
from edge_sdk.errors import DataError

# B = sequences of a micro-batch, T = tokens of its longest, N = samples of the data set.
IntArray = npt.NDArray[np.int64]

# Sorting whole data sets by length would make every epoch the same; sorting 50 batches at a time
# saves nearly all of the padding and leaves the order random (as in fairseq and AllenNLP).
BATCHES_PER_BUCKET = 50
# The epoch in use and the next one, which the last batch of an epoch may need.
KEPT_EPOCHS = 2


class MicroBatch(NamedTuple):
    """Sequences that pass through the model together, padded on the right."""

    input_ids: IntArray
    """(B, T); T is the length of the longest sequence in here."""
    lengths: npt.NDArray[np.int32]
    """(B,) tokens of each sequence before padding."""
    labels: IntArray
    """(B, T) not shifted, IGNORE where there is no loss; or (B,) class numbers."""
    pooled: npt.NDArray[np.int32] | None = None
    """(B,) position of the token at which a decoder with a classification head looks; None: the
    last one."""
    samples: tuple[int, ...] = ()
    """Positions of the sequences in the list of examples; empty where nothing is trained."""

    @property
    def num_targets(self) -> int:
        """Predictions that carry loss: targets after the first position, or sequences."""
        if self.labels.ndim == 1:
            return len(self.labels)
        # Position t is predicted from t - 1, so nothing predicts position 0.
        return int(np.count_nonzero(self.labels[:, 1:] != IGNORE))

    @property
    def predicts(self) -> npt.NDArray[np.bool_] | None:
        """(B, T) positions that predict a target; None for classes, which are of sequences."""
        if self.labels.ndim == 1:
            return None
        found = np.zeros(self.labels.shape, dtype=np.bool_)
        found[:, :-1] = self.labels[:, 1:] != IGNORE
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """What one step of one device learns from; batch_size sequences, always."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    """Each of micro_batch sequences, the longest first."""
    num_targets: int
    """Predictions that carry loss in the whole step: the divisor of its mean loss."""
    num_tokens: int
    """Tokens without padding in the whole step."""


class Batches:
    """The endless stream of steps over one device's examples.

    The stream is the epochs one after the other; an epoch holds every sample once, in an order of
    its own. Where the samples left in an epoch do not fill a step, the first ones of the next epoch
    complete it: every step then has batch_size samples, so the devices' shares of a round are
    exact, and still no sample is dropped or seen more often than another. A data set smaller than
    a step simply gives several epochs to each.

    Within an epoch the samples are shuffled, cut into buckets of 50 batches and sorted by length
    inside each bucket; then the batches are shuffled. Thread-safe.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        micro_batch: int,
        seed: int,
        name: str,
        *,
        pad_id: int = 0,
    ) -> None:
        """Prepare the stream.

        Args:
            examples: The device's samples, all causal or all classified.
            batch_size: Sequences of one step.
            micro_batch: Sequences that pass through the model together; divides *batch_size*.
            seed: Seed of the run.
            name: Name of the device; two devices with the same data see it in different orders.
            pad_id: Token id to pad with; the model never attends to it.

        Raises:
            ValueError: A size is not positive, or *micro_batch* does not divide *batch_size*.
            DataError: There are no examples.
        """
        if batch_size < 1 or micro_batch < 1 or batch_size % micro_batch:
            sizes = f"micro_batch {micro_batch} and batch_size {batch_size}"
            raise ValueError(f"{sizes}: both must be positive and the first divide the second")
        _check_examples(examples)
        self._examples = examples
        self._lengths = _lengths(examples)
        self._batch_size, self._micro_batch = batch_size, micro_batch
        self._seed, self._name, self._pad_id = seed, name, pad_id
        self._orders: dict[int, IntArray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of samples, i.e. of one epoch."""
        return len(self._examples)

    @property
    def batch_size(self) -> int:
        """Sequences of every step."""
        return self._batch_size

    def at(self, step: int) -> StepBatch:
        """Return the batch of *step*, counted from 0; the same on every call.

        Raises:
            ValueError: *step* is negative.
        """
        chosen = self.samples_at(step)
        longest_first = chosen[np.argsort(-self._lengths[chosen], kind="stable")]
        size = self._micro_batch
        micro_batches = tuple(
            pad([self._examples[i] for i in part], self._pad_id)._replace(
                samples=tuple(part.tolist())
            )
            for part in np.split(longest_first, range(size, len(longest_first), size))
        )
        return StepBatch(
            step=step,
            micro_batches=micro_batches,
            num_targets=sum(part.num_targets for part in micro_batches),
            num_tokens=sum(part.num_tokens for part in micro_batches),
        )

    def samples_at(self, step: int) -> IntArray:
        """Return the positions (batch_size,) of the samples of *step* in the list of examples."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        first, stop = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while first < stop:
            epoch, offset = divmod(first, len(self))
            part = self._order(epoch)[offset : offset + stop - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> IntArray:
        """Return the order (N,) of one epoch, computed at most once while it is in use."""
        with self._lock:
            if epoch not in self._orders:
                entropy = f"{self._seed}/{self._name}/{epoch}"
                # Samples that complete the last step of the epoch before.
                head = -epoch * len(self) % self._batch_size
                order = epoch_order(self._lengths, self._batch_size, head, entropy)
                while len(self._orders) >= KEPT_EPOCHS:
                    del self._orders[min(self._orders)]
                self._orders[epoch] = order
            return self._orders[epoch]


def epoch_order(
    lengths: npt.NDArray[np.int32], batch_size: int, head: int, entropy: str
) -> IntArray:
    """Return the positions of all samples in the order of one epoch.

    Args:
        lengths: (N,) tokens of each sample.
        batch_size: Sequences of one step.
        head: How many samples come before the first whole step.
        entropy: Whatever makes this order differ from another.

    Returns:
        (N,) first *head* samples of any length, then whole steps of similar length in random
        order, then those that are left over.
    """
    order = _shuffled(len(lengths), f"{entropy}/samples")
    body = order[head:]
    num_whole = len(body) // batch_size * batch_size
    whole, rest = body[:num_whole], body[num_whole:]
    bucket = batch_size * BATCHES_PER_BUCKET
    buckets = [whole[i : i + bucket] for i in range(0, num_whole, bucket)]
    sorted_ = [part[np.argsort(lengths[part], kind="stable")] for part in buckets]
    batches = np.concatenate([*sorted_, whole[:0]]).reshape(-1, batch_size)
    batches = batches[_shuffled(len(batches), f"{entropy}/batches")]
    return np.concatenate([order[:head], batches.ravel(), rest])


def eval_batches(
    examples: Sequence[Example], batch_size: int, *, pad_id: int = 0
) -> Iterator[MicroBatch]:
    """Yield every example once, longest first, in batches of *batch_size*; the last may be smaller.

    Raises:
        ValueError: *batch_size* is not positive.
        DataError: There are no examples, or causal and classified ones are mixed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_examples(examples)
    order = np.argsort(-_lengths(examples), kind="stable").astype(np.int64)
    parts = np.split(order, range(batch_size, len(order), batch_size))
    return (pad([examples[i] for i in part], pad_id) for part in parts)


def pad(examples: Sequence[Example], pad_id: int) -> MicroBatch:
    """Join examples to one micro-batch, padded on the right to the longest of them."""
    lengths = _lengths(examples)
    input_ids_BT = np.full((len(examples), int(lengths.max())), pad_id, dtype=np.int64)
    labels_BT = np.full_like(input_ids_BT, IGNORE)
    classes = []
    for row, example in enumerate(examples):
        input_ids_BT[row, : lengths[row]] = example.input_ids
        if isinstance(example.labels, int):
            classes.append(example.labels)
        else:
            labels_BT[row, : lengths[row]] = example.labels
    if not classes:
        return MicroBatch(input_ids_BT, lengths, labels_BT)
    labels_B = np.array(classes, dtype=np.int64)
    return MicroBatch(input_ids_BT, lengths, labels_B, pooled_positions(input_ids_BT, pad_id))


def pooled_positions(input_ids_BT: IntArray, pad_id: int) -> npt.NDArray[np.int32]:
    """Return where transformers' decoders look for the class of each sequence, (B,).

    At the rightmost token that is not *pad_id*, be that padding or part of the text: a text that
    ends in it is pooled before its end. 0 where there is no other token.
    """
    positions_T = np.arange(input_ids_BT.shape[1], dtype=np.int32)
    pooled: npt.NDArray[np.int32] = (positions_T * (input_ids_BT != pad_id)).max(1)
    return pooled


def _check_examples(examples: Sequence[Example]) -> None:
    """Refuse an empty data set and one that mixes causal and classified examples."""
    if not examples:
        raise DataError("there are no examples to learn from")
    for example in examples:
        if isinstance(example.labels, int) != isinstance(examples[0].labels, int):
            raise DataError(f"{example.where}: causal and classified examples are mixed")


def _lengths(examples: Sequence[Example]) -> npt.NDArray[np.int32]:
    """Return the tokens (N,) of each example."""
    return np.array([len(example.input_ids) for example in examples], dtype=np.int32)


def _shuffled(size: int, entropy: str) -> IntArray:
    """Return a permutation of range(size) that depends on *entropy* only.

    Raw PCG64 words, sorted: numpy guarantees the stream of a bit generator for all versions, but
    not that of Generator.permutation, and a run may be resumed with another numpy.
    """
    seed = int.from_bytes(hashlib.sha256(entropy.encode()).digest()[:16], "little")
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable").astype(np.int64)
