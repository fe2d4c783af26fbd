"""Nothing malformed reaches the model; what is refused is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.engine.interface import Job
from coordinator.rounds.state import Member
from coordinator.rounds.validation import (
    TargetCount,
    WaveInput,
    check_evaluation,
    check_gradient,
    check_ready,
    check_report,
    check_upload,
)
from edge_sdk.errors import NumericError, RemoteProtocolError
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    EvalReport,
    Ready,
    Stamp,
    StepReport,
    TopGradient,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.protocol.tensors import check_tensors

PLAN = Plan(split=2, ranks={}, alphas={}, batch_size=8, micro_batch=4)
MEMBER = Member("a", 2, 8, 2, is_local=False)
MESSAGE = Activation(stamp=Stamp(), micro=0, num_micro=2, num_targets=5)
VOCAB, CLASSES, LONGEST, HIDDEN = 50, 3, 6, 8


def make_input(labels: str = "server", num_labels: int = 0) -> WaveInput:
    """What a run allows."""
    return WaveInput(HIDDEN, VOCAB, num_labels, LONGEST, labels)


def tensors(**changes: Any) -> dict[str, Any]:
    """What an honest device sends, but for *changes*; None leaves a tensor out."""
    honest = {
        "hidden": np.ones((3, 5, HIDDEN), np.float32),
        "lengths": np.array([5, 1, 3], np.int32),
        "labels": np.full((3, 5), -100, np.int32),
    }
    return {name: value for name, value in {**honest, **changes}.items() if value is not None}


def judge(sent: dict[str, Any]) -> Job:
    """What becomes of *sent* on its way in: first the protocol looks, then the run."""
    check_tensors(MESSAGE, sent)
    return make_input().job(MEMBER, PLAN, MESSAGE, sent)


def judge_gradient(sent: dict[str, Any], job: Job) -> None:
    """The same for a gradient."""
    check_tensors(GRADIENT, sent)
    check_gradient(GRADIENT, sent, job)


MOST = 1e4


def judge_upload(sent: dict[str, Any]) -> None:
    """The same for an upload."""
    check_tensors(UPLOAD, sent)
    check_upload(UPLOAD, sent, SHAPES, MOST, is_due=True)


def test_an_honest_message_becomes_a_job() -> None:
    """Tensors arrive as they are, with the plan's split and the step's samples."""
    sent = tensors()

    job = make_input().job(MEMBER, PLAN, MESSAGE, sent)

    assert (job.device, job.split, job.weight, job.num_targets) == ("a", 2, 8.0, 5)
    assert job.hidden_BTD is sent["hidden"]
    assert job.lengths_B is sent["lengths"]
    assert job.labels is sent["labels"]


def test_labels_that_stay_on_the_device_are_not_taken() -> None:
    """With `labels: device` a job has none, and sending them is a mistake."""
    job = make_input("device").job(MEMBER, PLAN, MESSAGE, tensors(labels=None))

    assert job.labels is None
    with pytest.raises(RemoteProtocolError, match="'labels': not expected; .* hidden, lengths"):
        make_input("device").job(MEMBER, PLAN, MESSAGE, tensors())


def test_classes_are_one_number_a_sequence() -> None:
    """A classifier's labels are checked against its classes."""
    good = np.array([0, 2, 1], np.int32)

    job = make_input(num_labels=CLASSES).job(MEMBER, PLAN, MESSAGE, tensors(labels=good))

    assert job.labels is good
    for bad in (np.array([0, 3, 1], np.int32), np.array([0, -100, 1], np.int32)):
        with pytest.raises(RemoteProtocolError, match=r"labels outside 0\.\.2"):
            make_input(num_labels=CLASSES).job(MEMBER, PLAN, MESSAGE, tensors(labels=bad))


POOLED: list[tuple[tuple[int, ...], str]] = [
    ((4, 0), "2 positions, 3 rows"),
    ((5, 0, 2), "outside its sequence"),
    ((4, 1, 2), "outside its sequence"),
    ((4, -1, 2), "outside its sequence"),
    ((2**62, 0, 2), "outside its sequence"),
]


@pytest.mark.parametrize(("pooled", "message"), POOLED)
def test_a_classifier_looks_inside_of_its_sequences(pooled: tuple[int, ...], message: str) -> None:
    """Positions are one for each row and lie before its end; they are taken as they are."""
    labels = np.array([0, 2, 1], np.int32)
    judged = make_input(num_labels=CLASSES)

    good = judged.job(MEMBER, PLAN, replace(MESSAGE, pooled=(3, 0, 2)), tensors(labels=labels))
    usual = judged.job(MEMBER, PLAN, MESSAGE, tensors(labels=labels))

    assert good.pooled_B is not None
    assert good.pooled_B.tolist() == [3, 0, 2]
    assert usual.pooled_B is None
    with pytest.raises(RemoteProtocolError, match=message):
        judged.job(MEMBER, PLAN, replace(MESSAGE, pooled=pooled), tensors(labels=labels))


def hidden(*shape: int, dtype: Any = np.float32) -> Any:
    """A hidden state."""
    return np.zeros(shape, dtype)


def sized(rows: int, longest: int) -> dict[str, Any]:
    """Tensors of another size that fit each other."""
    return {
        "hidden": hidden(rows, longest, HIDDEN),
        "lengths": np.full(rows, longest, np.int32),
        "labels": np.full((rows, longest), -100, np.int32),
    }


MALFORMED = [
    ({"hidden": None}, r"Activation without hidden states"),
    ({"lengths": None}, r"Activation: tensor 'lengths': missing; due: int32 \(B\)"),
    ({"labels": None}, r"Activation: tensor 'labels': missing; due: \(3, 5\)"),
    ({"extra": np.zeros(1)}, "'extra': not expected; allowed: 'hidden', 'lengths', 'labels'"),
    ({"hidden": hidden(3, 5, HIDDEN, dtype=np.float64)}, "'hidden': float64"),
    ({"hidden": hidden(3, 5, HIDDEN, dtype=np.int32)}, "'hidden': int32"),
    ({"hidden": hidden(3, 5)}, r"'hidden': float32 \(3, 5\), allowed: float32 \(C, T, D\)"),
    ({"hidden": hidden()}, r"'hidden': float32 \(\), allowed"),
    ({"hidden": hidden(3, 5, HIDDEN, 1)}, r"'hidden': float32 \(3, 5, 8, 1\), allowed"),
    ({"hidden": hidden(3, 5, HIDDEN + 1)}, "size 9, the model has 8"),
    ({"hidden": hidden(3, 5, 0)}, "size 0"),
    (sized(0, 5), "0 x 5, the plan allows 4 x 6"),
    (sized(5, 5), "5 x 5, the plan allows 4 x 6"),
    (sized(3, 7), "3 x 7, the plan allows 4 x 6"),
    (sized(3, 0), "3 x 0, the plan allows 4 x 6"),
    ({"lengths": np.array([5, 1, 3], np.int64)}, "'lengths': int64"),
    ({"lengths": np.array([5.0, 1, 3], np.float32)}, "'lengths': float32"),
    ({"lengths": np.array([5, 1], np.int32)}, r"'labels': int32 \(3, 5\), .* B = 2"),
    ({"lengths": np.array([[5, 1, 3]], np.int32)}, r"'lengths': int32 \(1, 3\)"),
    ({"lengths": np.array([5, 0, 3], np.int32)}, r"lengths outside 1\.\.5"),
    ({"lengths": np.array([5, -1, 3], np.int32)}, r"lengths outside 1\.\.5"),
    ({"lengths": np.array([6, 1, 3], np.int32)}, r"lengths outside 1\.\.5"),
    ({"labels": np.zeros((3, 5), np.int64)}, "'labels': int64"),
    ({"labels": np.zeros((3, 4), np.int32)}, r"'labels': int32 \(3, 4\), .* T = 5"),
    ({"labels": np.zeros(3, np.int32)}, r"'labels': \(3,\), allowed: \(3, 5\)"),
    ({"labels": np.full((3, 5), VOCAB, np.int32)}, r"labels outside 0\.\.49"),
    ({"labels": np.full((3, 5), -1, np.int32)}, r"labels outside 0\.\.49"),
    ({"labels": np.full((3, 5), -101, np.int32)}, r"labels outside 0\.\.49"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED)
def test_a_malformed_tensor_is_refused(changes: dict[str, Any], message: str) -> None:
    """Missing, surplus, wrong dtype, wrong shape, out of range: each by its name."""
    with pytest.raises(RemoteProtocolError, match=message):
        judge(tensors(**changes))


@pytest.mark.parametrize("num_targets", [0, -1])
def test_a_step_without_targets_is_refused(num_targets: int) -> None:
    """A loss over nothing would be a division by zero."""
    message = replace(MESSAGE, num_targets=num_targets)

    with pytest.raises(RemoteProtocolError, match=f"num_targets: {num_targets}"):
        make_input().job(MEMBER, PLAN, message, tensors())


def test_no_step_has_more_targets_than_tokens() -> None:
    """More targets than the plan's sequences can hold are refused."""
    message = replace(MESSAGE, num_targets=8 * LONGEST + 1)

    with pytest.raises(RemoteProtocolError, match="num_targets: 49, at most 48 fit"):
        make_input().job(MEMBER, PLAN, message, tensors())


def counted(labels: list[Any], announced: list[int]) -> None:
    """Send a step's micro-batches with these labels, each announcing a number of targets."""
    count, limits = TargetCount(), make_input()
    for micro, (own, num_targets) in enumerate(zip(labels, announced, strict=True)):
        message = replace(MESSAGE, micro=micro, num_micro=len(labels), num_targets=num_targets)
        count.add(message, limits.job(MEMBER, PLAN, message, tensors(labels=own)))


# The first position predicts nothing: four targets in each of three sequences of five.
ALL, NONE = np.full((3, 5), 7, np.int32), np.full((3, 5), -100, np.int32)


@pytest.mark.parametrize(
    ("labels", "announced", "words"),
    [
        ([ALL], [1], "num_targets: 1 after 1, and 12 in the labels of 1 of 1"),
        ([ALL], [13], "and 12 in the labels of 1 of 1"),
        ([NONE], [1], "and 0 in the labels of 1 of 1"),
        ([ALL, ALL], [11, 24], "num_targets: 11 after 11, and 12 in the labels of 1 of 2"),
        ([ALL, ALL], [25, 24], "num_targets: 24 after 25"),
        ([ALL, ALL], [25, 25], "and 24 in the labels of 2 of 2"),
        ([ALL, NONE], [24, 24], "and 12 in the labels of 2 of 2"),
    ],
)
def test_targets_are_those_of_the_labels(
    labels: list[Any], announced: list[int], words: str
) -> None:
    """A device that announces fewer or more targets than it brings would weigh more or less."""
    counted([ALL], [12])
    counted([ALL, NONE, ALL], [24, 24, 24])

    with pytest.raises(RemoteProtocolError, match=words):
        counted(labels, announced)


REPORT = StepReport(
    stamp=Stamp(),
    loss=1.0,
    num_targets=1,
    num_sequences=1,
    num_tokens=1,
    compute_s=0.1,
    wait_s=0.0,
    peak_bytes=9,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": 1.7e308},
        {"loss": -1.0},
        {"num_targets": 49},
        {"num_sequences": 2**62},
        {"num_tokens": -1},
        {"num_tokens": 49},
        {"compute_s": 1e308},
        {"compute_s": -1.0},
        {"wait_s": 1e10},
        {"peak_bytes": 2**62},
    ],
)
def test_what_no_step_can_have_is_not_reported(changes: dict[str, Any]) -> None:
    """Losses, counts, seconds and bytes have bounds: their sums are numbers of a file."""
    check_report(REPORT, 48, 1)

    with pytest.raises(RemoteProtocolError, match="step report"):
        check_report(replace(REPORT, **changes), 48, 1)


def test_sequences_are_those_of_the_plan() -> None:
    """A device reports as many as its plan has, and no other number."""
    with pytest.raises(RemoteProtocolError, match="1 sequences, the plan has 8"):
        check_report(REPORT, 48, 8)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_report_has_the_targets_of_its_step(labels: str) -> None:
    """Whoever has the labels: what was announced is what is reported, for the latest steps."""
    count, limits = TargetCount(), make_input(labels)
    own = {"labels": ALL if labels == "server" else None}
    for step in range(6):
        message = replace(MESSAGE, stamp=Stamp(step=step), num_micro=1, num_targets=12)
        count.add(message, limits.job(MEMBER, PLAN, message, tensors(**own)))
    report = replace(REPORT, stamp=Stamp(step=5), num_targets=12)

    count.check("a", report)
    count.check("a", replace(report, stamp=Stamp(step=0), num_targets=1))  # not known any more

    with pytest.raises(RemoteProtocolError, match="11 targets, the step was of 12"):
        count.check("a", replace(report, num_targets=11))
    wrong = replace(MESSAGE, stamp=Stamp(step=5), micro=1, num_targets=3)
    job = limits.job(MEMBER, PLAN, wrong, tensors(**own))
    with pytest.raises(RemoteProtocolError, match="num_targets: 3 after 12"):
        count.add(wrong, job)


@pytest.mark.parametrize(
    "changes",
    [{"num_samples": 2**62}, {"num_samples": -1}, {"left_out": 2**50}, {"cut": -1}, {"cut": 10}],
)
def test_no_device_has_so_many_samples(changes: dict[str, Any]) -> None:
    """Numbers of rows and samples have bounds, and no more are cut than there are."""
    ready = Ready(stamp=Stamp(), vocab_size=VOCAB, num_samples=9, held_steps=())
    check_ready(ready)

    with pytest.raises(RemoteProtocolError, match="which no device has"):
        check_ready(replace(ready, **changes))


@pytest.mark.parametrize(
    "values",
    [(1.0, 1, 2), (1.0, -1, -1), (-1e300, 5, 0), (1e308, 5, 0), (1.0, 2**62, 1), (1e10, 0, 0)],
)
def test_what_no_evaluation_can_have_is_not_reported(values: tuple[float, int, int]) -> None:
    """More right than asked, a negative or an endless loss, more targets than there can be."""
    check_evaluation(EvalReport(stamp=Stamp(), loss_sum=0.0, num_targets=0, num_correct=0))
    check_evaluation(EvalReport(stamp=Stamp(), loss_sum=9.5, num_targets=5, num_correct=5))
    loss_sum, targets, correct = values

    with pytest.raises(RemoteProtocolError, match="evaluation"):
        check_evaluation(
            EvalReport(stamp=Stamp(), loss_sum=loss_sum, num_targets=targets, num_correct=correct)
        )


GRADIENT, UPLOAD = TopGradient(stamp=Stamp(), micro=0), AdapterUpload(stamp=Stamp())
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_numbers_must_be_finite(bad: float) -> None:
    """One NaN or infinity in a hidden state, gradient or upload is a numeric error."""
    values = hidden(3, 5, HIDDEN)
    values[2, 4, 7] = bad
    job = make_input().job(MEMBER, PLAN, MESSAGE, tensors())

    with pytest.raises(NumericError, match="hidden: 1 of 120 numbers"):
        make_input().job(MEMBER, PLAN, MESSAGE, tensors(hidden=values))
    with pytest.raises(NumericError, match="grad: 1 of 120"):
        check_gradient(GRADIENT, {"grad": values}, job)
    with pytest.raises(NumericError, match="upload 'w.A': 1 of 120"):
        check_upload(UPLOAD, {"w.A": values}, {"w.A": values.shape}, MOST, is_due=False)
    check_upload(UPLOAD, {"w.A": values}, {"w.A": values.shape}, MOST, is_due=True)


@pytest.mark.parametrize(
    "grad", [None, hidden(3, 5, HIDDEN, dtype=np.float64), hidden(3, 4, HIDDEN), hidden(120)]
)
def test_a_gradient_fits_its_hidden_state(grad: Any) -> None:
    """A gradient of another dtype or shape than the hidden state is refused."""
    job = make_input().job(MEMBER, PLAN, MESSAGE, tensors())

    sent = {} if grad is None else {"grad": grad}
    with pytest.raises(
        RemoteProtocolError, match="TopGradient: tensor 'grad': .*(float32|3, 5, 8)"
    ):
        judge_gradient(sent, job)
    good = hidden(3, 5, HIDDEN)
    assert check_gradient(GRADIENT, {"grad": good}, job) is good


def test_a_device_may_name_the_positions_that_it_wants() -> None:
    """With its labels at home; what comes back is of these, and so is the gradient."""
    message = replace(MESSAGE, wanted=(1, 4, 12, 14))
    sent = tensors(labels=None)

    job = make_input("device").job(MEMBER, PLAN, message, sent)

    assert job.top_shape == (5, HIDDEN)
    assert job.wanted_BT is not None
    assert np.flatnonzero(job.wanted_BT.ravel()).tolist() == [1, 2, 3, 12, 13]
    good = hidden(5, HIDDEN)
    check_tensors(GRADIENT, {"grad": good})
    assert check_gradient(GRADIENT, {"grad": good}, job) is good
    with pytest.raises(RemoteProtocolError, match=r"'grad': \(3, 5, 8\), allowed: \(5, 8\)"):
        check_gradient(GRADIENT, {"grad": hidden(3, 5, HIDDEN)}, job)


def test_positions_that_are_not_there_are_refused() -> None:
    """Beyond the last one; with the labels here they mean nothing."""
    message = replace(MESSAGE, wanted=(1, 16))

    with pytest.raises(RemoteProtocolError, match="wanted: no ascending runs of 3 x 5 positions"):
        make_input("device").job(MEMBER, PLAN, message, tensors(labels=None))
    assert make_input().job(MEMBER, PLAN, message, tensors()).wanted_BT is None


SHAPES = {"w.A": (2, 3), "w.B": (4, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w.A": None}, "'w.A': missing beside 'w.B'"),
        ({"w.A": None, "w.B": None}, r"'w.A': missing; due: \(2, 3\)"),
        ({"v.A": hidden(2, 3)}, "'v.B': missing beside 'v.A'"),
        ({"v.A": hidden(2, 3), "v.B": hidden(4, 2)}, "'v.A': not expected; allowed: w.A, w.B"),
        ({"w.A": hidden(3, 2)}, r"'w.B': float32 \(4, 2\), .* R = 3, I = 2"),
        ({"w.A": hidden(2, 2)}, r"'w.A': \(2, 2\), allowed: \(2, 3\)"),
        ({"w.B": hidden(4, 2, dtype=np.float64)}, "'w.B': float64"),
    ],
)
def test_an_upload_is_what_the_plan_says(changes: dict[str, Any], message: str) -> None:
    """Every planned factor, nothing else, in the planned shape and in float32."""
    sent = {"w.A": hidden(2, 3), "w.B": hidden(4, 2)}
    check_upload(UPLOAD, sent, SHAPES, MOST, is_due=True)

    wrong = {name: value for name, value in {**sent, **changes}.items() if value is not None}
    with pytest.raises(RemoteProtocolError, match=message):
        judge_upload(wrong)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (None, "ids"),
        (np.full((3, 4), 7, np.int32), "ids"),
        (np.full((3, 5), VOCAB, np.int32), f"ids outside 0..{VOCAB - 1}"),
        (np.full((3, 5), -1, np.int32), f"ids outside 0..{VOCAB - 1}"),
    ],
)
def test_token_ids_are_there_where_blocks_need_them(ids: Any, reason: str) -> None:
    """Ids that are missing, of another shape or of no token are refused, and others taken over."""
    judge_ids = WaveInput(HIDDEN, VOCAB, 0, LONGEST, "server", wants_ids=True)
    fitting = np.full((3, 5), VOCAB - 1, np.int32)

    job = judge_ids.job(MEMBER, PLAN, MESSAGE, tensors(ids=fitting))

    assert job.ids_BT is fitting
    with pytest.raises(RemoteProtocolError, match=reason):
        judge_ids.job(MEMBER, PLAN, MESSAGE, tensors(ids=ids))


def test_token_ids_that_nobody_asked_for_are_refused() -> None:
    """A device cannot hand in what the run has no use for."""
    with pytest.raises(RemoteProtocolError, match="ids"):
        judge(tensors(ids=np.ones((3, 5), np.int32)))
