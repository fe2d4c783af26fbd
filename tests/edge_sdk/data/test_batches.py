"""Batches: a pure function of the step, every sample once per epoch, little padding."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.data.batches import Batches, MicroBatch, StepBatch, epoch_order, eval_batches
from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.tokenize import Example
from edge_sdk.errors import DataError

PAD = 9


def causal(length: int, num_context: int = 0, number: int = 0) -> Example:
    """Return an example of ids 1, 2, ... + 1000 *number* whose first labels carry no loss."""
    ids = np.arange(1, length + 1, dtype=np.int32) + 1000 * number
    labels = np.where(np.arange(length) < num_context, IGNORE, ids).astype(np.int32)
    return Example(ids, labels, f"row:{length}")


def many(num: int, seed: int = 0) -> list[Example]:
    """Return examples of lengths 2 to 100, each with ids of its own."""
    lengths = np.random.default_rng(seed).integers(2, 101, num)
    return [causal(int(length), number=number) for number, length in enumerate(lengths)]


def samples_of(batch: StepBatch) -> list[int]:
    """Return the positions of all samples of a step."""
    return [i for part in batch.micro_batches for i in numbers_of(part)]


def numbers_of(part: MicroBatch) -> list[int]:
    """Return the positions of the samples of a micro-batch, which their ids tell."""
    return [int(first) // 1000 for first in part.input_ids[:, 0]]


def same(a: StepBatch, b: StepBatch) -> bool:
    """Whether two steps hold the same numbers."""
    names = ("input_ids", "labels", "lengths")
    return len(a.micro_batches) == len(b.micro_batches) and all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True)
        for name in names
    )


sizes = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))


@given(sizes, st.integers(0, 99))
def test_every_sample_is_seen_once_per_epoch(size: tuple[int, int, int], seed: int) -> None:
    """Over any number of epochs each sample occurs as often as every other."""
    num, micro_batch, num_micro = size
    batch_size = micro_batch * num_micro
    batches = Batches(many(num), batch_size, micro_batch, seed, "a")

    stream = [i for step in range(3 * num) for i in batches.samples_at(step)]

    for epoch in range(3 * batch_size):
        assert sorted(stream[epoch * num : (epoch + 1) * num]) == list(range(num))


@given(sizes, st.integers(0, 50))
def test_a_step_is_a_pure_function(size: tuple[int, int, int], step: int) -> None:
    """The step depends neither on the steps asked for before nor on the object."""
    num, micro_batch, num_micro = size
    first, second = (Batches(many(num), micro_batch * num_micro, micro_batch, 7, "a") for _ in "ab")
    for other in (0, 40, step + 3):
        second.at(other)

    assert same(first.at(step), second.at(step))


@given(sizes, st.integers(0, 20))
def test_shapes_and_counts(size: tuple[int, int, int], step: int) -> None:
    """Every step has batch_size samples, in micro-batches padded to their longest only."""
    num, micro_batch, num_micro = size
    examples = many(num)

    batch = Batches(examples, micro_batch * num_micro, micro_batch, 0, "a", pad_id=PAD).at(step)

    assert len(batch.micro_batches) == num_micro
    for part in batch.micro_batches:
        assert part.input_ids.shape == part.labels.shape == (micro_batch, part.lengths.max())
        assert (part.input_ids.dtype, part.labels.dtype) == (np.int64, np.int64)
        assert part.lengths.dtype == np.int32
        for row, sample in enumerate(numbers_of(part)):
            length = part.lengths[row]
            assert np.array_equal(part.input_ids[row, :length], examples[sample].input_ids)
            assert (part.input_ids[row, length:] == PAD).all()
            assert (part.labels[row, length:] == IGNORE).all()
    lengths = [len(examples[i].input_ids) for i in samples_of(batch)]
    assert lengths == sorted(lengths, reverse=True)
    assert batch.num_tokens == sum(lengths)
    assert batch.num_targets == sum(lengths) - len(lengths)


def test_targets_are_counted_after_the_shift() -> None:
    """Nobody predicts position 0, so its label never counts; context does not count either."""
    examples = [causal(5), causal(5, num_context=3), causal(2, num_context=1)]

    batch = Batches(examples, 3, 1, 0, "a").at(0)

    assert batch.num_targets == 4 + 2 + 1
    assert batch.num_tokens == 12


def test_classes_stay_one_number_per_sequence() -> None:
    """A classifier's labels are (B,), and every sequence is one target."""
    examples = [Example(causal(n + 1).input_ids, n % 3, "row") for n in range(6)]

    batch = Batches(examples, 6, 2, 0, "a").at(0)

    assert [part.labels.shape for part in batch.micro_batches] == [(2,), (2,), (2,)]
    assert [int(n) for part in batch.micro_batches for n in part.labels] == [2, 1, 0, 2, 1, 0]
    assert batch.num_targets == 6


def test_epochs_seeds_and_names_give_other_orders() -> None:
    """Each epoch is reshuffled, and devices with the same data do not walk in step."""
    examples = many(64)
    stream = Batches(examples, 8, 8, 0, "a")
    epochs = [[samples_of(stream.at(8 * epoch + step)) for step in range(8)] for epoch in (0, 1)]
    other_seed = [samples_of(Batches(examples, 8, 8, 1, "a").at(step)) for step in range(8)]
    other_name = [samples_of(Batches(examples, 8, 8, 0, "b").at(step)) for step in range(8)]

    orders = [*epochs, other_seed, other_name]

    assert len({str(order) for order in orders}) == 4


def test_the_order_is_fixed_for_all_time() -> None:
    """A run resumed with a newer version of this code or of numpy sees the same samples."""
    batches = Batches([causal(n + 2) for n in range(7)], 3, 3, 42, "device-1")
    expected = [[0, 1, 2], [3, 5, 6], [4, 0, 4], [1, 3, 5]]

    assert [batches.samples_at(step).tolist() for step in range(4)] == expected


def test_buckets_save_padding() -> None:
    """Batches of similar length carry a few percent of padding; random ones carry a third."""
    batches = Batches(many(2000), 16, 4, 0, "a")

    parts = [part for step in range(125) for part in batches.at(step).micro_batches]

    padded = sum(part.input_ids.size for part in parts)
    assert 1 - sum(part.num_tokens for part in parts) / padded < 0.03


def test_batches_of_an_epoch_come_in_random_order() -> None:
    """Short and long batches alternate: sorting by length must not become a curriculum."""
    batches = Batches(many(1600), 16, 16, 0, "a")

    means = [batches.at(step).num_tokens for step in range(100)]

    assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.3


def test_a_small_data_set_fills_a_step_with_epochs() -> None:
    """Three samples and a batch of eight: every step has eight, and counts differ by one."""
    batches = Batches(many(3), 8, 4, 0, "a")

    counts = Counter(samples_of(batches.at(0)))

    assert sorted(counts.values()) == [2, 3, 3]


@given(st.integers(1, 200), st.integers(1, 16), st.integers(0, 15))
def test_an_epoch_is_a_permutation(num: int, batch_size: int, head: int) -> None:
    """Whatever the sizes, an epoch holds each sample once."""
    lengths = np.arange(num, dtype=np.int32)

    assert sorted(epoch_order(lengths, batch_size, head, "x").tolist()) == list(range(num))


def test_many_threads_get_the_same_steps() -> None:
    """Preparing steps in the background changes nothing."""
    examples = many(50)
    alone, shared = (Batches(examples, 8, 4, 3, "a") for _ in range(2))
    results: dict[tuple[int, int], StepBatch] = {}

    def work(worker: int) -> None:
        for step in range(40):
            results[worker, step] = shared.at((step * 7 + worker) % 40)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 160
    assert all(same(batch, alone.at(batch.step)) for batch in results.values())


@given(st.integers(1, 40), st.integers(1, 12))
def test_evaluation_sees_every_example_once(num: int, batch_size: int) -> None:
    """Evaluation goes from the longest to the shortest, each once, the same way every time."""
    examples = many(num)

    parts: list[MicroBatch] = list(eval_batches(examples, batch_size))

    lengths = [int(length) for part in parts for length in part.lengths]
    assert sorted(i for part in parts for i in numbers_of(part)) == list(range(num))
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(part.lengths) == batch_size for part in parts[:-1])
    assert sum(part.num_targets for part in parts) == sum(lengths) - num


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(0, 1), (4, 0), (4, 3), (2, 4), (-4, -2)])
def test_sizes_that_do_not_fit_are_refused(batch_size: int, micro_batch: int) -> None:
    """A micro-batch must divide the batch, so that all micro-batches are equal."""
    with pytest.raises(ValueError, match=f"micro_batch {micro_batch} and batch_size {batch_size}"):
        Batches(many(4), batch_size, micro_batch, 0, "a")


def test_bad_examples_are_refused() -> None:
    """No examples, and examples of two kinds, are errors of the data."""
    mixed = [causal(3), Example(causal(3).input_ids, 1, "row:2")]

    with pytest.raises(DataError, match="no examples"):
        Batches([], 1, 1, 0, "a")
    with pytest.raises(DataError, match="row:2: causal and classified"):
        Batches(mixed, 1, 1, 0, "a")
    with pytest.raises(DataError, match="no examples"):
        eval_batches([], 1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        eval_batches(mixed[:1], 0)
    with pytest.raises(ValueError, match="step must be at least 0"):
        Batches(mixed[:1], 1, 1, 0, "a").at(-1)
