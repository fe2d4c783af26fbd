"""Judge what a device sends before it touches the model: what depends on run and plan. Pure.

The protocol has checked on arrival that the tensors are those of the message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from coordinator.aggregation.limits import largest
from coordinator.engine.interface import Job
from coordinator.rounds.state import Member
from edge_sdk.errors import NumericError, RemoteProtocolError
from edge_sdk.lora.factors import Array
from edge_sdk.model.loss import IGNORED
from edge_sdk.protocol.codecs import require_finite
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    EvalReport,
    Ready,
    StepReport,
    TopGradient,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.protocol.positions import Mask, from_runs
from edge_sdk.protocol.tensors import Shape, check_shapes

# Importance is loss times relative change, about 1 in tiny models; sums of this bound are finite.
MAX_IMPORTANCE = 1e9
# Bounds of what is reported, far above what is true, so that sums of them are numbers that a file
# and a person can read: mean loss of a target, seconds of a step, bytes, targets of an evaluation.
MAX_LOSS = 1e9
MAX_SECONDS = 1e9
MAX_BYTES = 2**60
MAX_TARGETS = 2**48
# Rounding can make a loss of almost nothing negative.
LEAST_LOSS = -1e-3
# Steps of a device whose numbers of targets are remembered: more than are under way at once.
REMEMBERED_STEPS = 4
# Rows and samples on a device.
MAX_SAMPLES = 2**48


class WaveInput:
    """The shapes that the run allows."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        num_labels: int,
        max_length: int,
        labels: str,
        *,
        wants_ids: bool = False,
    ) -> None:
        self._hidden_size, self._vocab_size = hidden_size, vocab_size
        self._num_labels, self._max_length = num_labels, max_length
        self._wants_labels, self._wants_ids = labels == "server", wants_ids

    def job(
        self, member: Member, plan: Plan, message: Activation, tensors: Mapping[str, Array]
    ) -> Job:
        """Return the job that *message* asks for.

        Raises:
            RemoteProtocolError: labels or ids are missing or unwanted, or a tensor is too large,
                not of the model's size, or out of range.
            NumericError: it holds NaN or infinity.
        """
        if "hidden" not in tensors:
            raise RemoteProtocolError("Activation without hidden states")
        hidden_BTD, lengths_B = tensors["hidden"], tensors["lengths"]
        self._check_hidden(hidden_BTD, plan)
        rows, longest = hidden_BTD.shape[:2]
        shapes: dict[str, Shape] = {"hidden": hidden_BTD.shape, "lengths": (rows,)}
        if self._wants_labels:
            shapes["labels"] = (rows,) if self._num_labels else (rows, longest)
        if self._wants_ids:
            shapes["ids"] = (rows, longest)
        check_shapes(message, tensors, shapes)
        if lengths_B.min() < 1 or lengths_B.max() > longest:
            raise RemoteProtocolError(f"lengths outside 1..{longest}")
        most = self.most_tokens(plan)
        if message.num_targets < 1:
            raise RemoteProtocolError(f"num_targets: {message.num_targets}, at least 1 is needed")
        if message.num_targets > most:
            raise RemoteProtocolError(f"num_targets: {message.num_targets}, at most {most} fit")
        labels = tensors["labels"] if self._wants_labels else None
        if labels is not None:
            self._check_labels(labels)
        ids = tensors["ids"] if self._wants_ids else None
        if ids is not None and not ((ids >= 0) & (ids < self._vocab_size)).all():
            raise RemoteProtocolError(f"ids outside 0..{self._vocab_size - 1}")
        pooled_B = self._pooled(message, lengths_B)
        return Job(
            device=member.name,
            split=plan.split,
            weight=float(plan.batch_size),
            num_targets=message.num_targets,
            hidden_BTD=hidden_BTD,
            lengths_B=lengths_B,
            labels=labels,
            pooled_B=pooled_B,
            ids_BT=ids,
            wanted_BT=self._wanted(message, rows, longest),
            micro=message.micro,
        )

    def _wanted(self, message: Activation, rows: int, longest: int) -> Mask | None:
        """Return where the device wants its final hidden state; None: everywhere, or not at all."""
        if not message.wanted or self._wants_labels:
            return None
        return from_runs(message.wanted, rows, longest)

    def _pooled(self, message: Activation, lengths_B: Array) -> Array | None:
        """Return where the head is to look in each sequence, if the message says so."""
        if not message.pooled or not self._num_labels:
            return None
        pooled_B = np.array(message.pooled, dtype=np.int64)
        if len(pooled_B) != len(lengths_B):
            raise RemoteProtocolError(f"pooled: {len(pooled_B)} positions, {len(lengths_B)} rows")
        if not ((pooled_B >= 0) & (pooled_B < lengths_B)).all():
            raise RemoteProtocolError("pooled: a position outside its sequence")
        return pooled_B.astype(np.int32)

    def most_tokens(self, plan: Plan) -> int:
        """Return how many tokens, and so targets, a step of *plan* can have at most."""
        return plan.batch_size * self._max_length

    def _check_hidden(self, hidden_BTD: Array, plan: Plan) -> None:
        rows, longest, size = hidden_BTD.shape
        if size != self._hidden_size:
            raise RemoteProtocolError(f"hidden: size {size}, the model has {self._hidden_size}")
        if not 1 <= rows <= plan.micro_batch or not 1 <= longest <= self._max_length:
            raise RemoteProtocolError(
                f"hidden: {rows} x {longest}, the plan allows {plan.micro_batch} x "
                f"{self._max_length}"
            )
        require_finite(hidden_BTD, "hidden")

    def _check_labels(self, labels: Array) -> None:
        top = self._num_labels or self._vocab_size
        is_known = (labels >= 0) & (labels < top)
        if not self._num_labels:
            is_known |= labels == IGNORED
        if not is_known.all():
            raise RemoteProtocolError(f"labels outside 0..{top - 1}")


def check_gradient(message: TopGradient, tensors: Mapping[str, Array], job: Job) -> Array:
    """Return the gradient; refuse one that does not fit the hidden state it belongs to."""
    check_shapes(message, tensors, {"grad": job.top_shape})
    require_finite(tensors["grad"], "grad")
    return tensors["grad"]


class TargetCount:
    """Compares the targets that devices announce for a step with those that their labels have."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[int, int]] = {}
        """Announced and counted targets of the step that is going on, by device."""
        self._announced: dict[str, dict[int, int]] = {}
        """Announced targets of the latest steps, by device."""

    def add(self, message: Activation, job: Job) -> None:
        """Count the labels of a micro-batch, which come in the order of the step.

        Raises:
            RemoteProtocolError: the step has more or fewer targets than were announced, or another
                number was announced before.
        """
        step = message.stamp.step
        steps = self._announced.setdefault(job.device, {})
        before = steps.get(step, message.num_targets) if message.micro else message.num_targets
        if message.num_targets != before:
            raise RemoteProtocolError(f"num_targets: {message.num_targets} after {before}")
        steps[step] = message.num_targets
        while len(steps) > REMEMBERED_STEPS:
            del steps[min(steps)]
        if job.labels is None:
            return
        announced, counted = self._steps.get(job.device, (0, 0))
        if message.micro == 0:
            announced, counted = message.num_targets, 0
        counted += num_targets(job.labels)
        self._steps[job.device] = announced, counted
        is_last = message.micro + 1 == message.num_micro
        is_wrong = counted != announced if is_last else counted > announced
        if message.num_targets != announced or is_wrong:
            raise RemoteProtocolError(
                f"num_targets: {message.num_targets} after {announced}, and {counted} in the labels"
                f" of {message.micro + 1} of {message.num_micro} micro-batches"
            )

    def check(self, device: str, report: StepReport) -> None:
        """Refuse the report of a step that had another number of targets, if that is known."""
        steps = self._announced.get(device, {})
        due = steps.get(report.stamp.step, report.num_targets)
        if report.num_targets != due:
            raise RemoteProtocolError(
                f"step report: {report.num_targets} targets, the step was of {due}"
            )


def num_targets(labels: Array) -> int:
    """Count the targets of labels: (B) classes, or (B, T) of which the first predicts nothing."""
    return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != IGNORED).sum())


def check_report(report: StepReport, most_tokens: int, batch_size: int) -> None:
    """Refuse what no step of a plan can have; that numbers are finite is checked on arrival."""
    counts = (report.num_targets, report.num_sequences, report.num_tokens, report.peak_bytes)
    if min(counts) < 0:
        raise RemoteProtocolError(f"step report: a negative count among {counts}")
    if max(counts[:3]) > most_tokens or report.peak_bytes > MAX_BYTES:
        raise RemoteProtocolError(
            f"step report: a count among {counts} is above the plan's {most_tokens} tokens or "
            f"{MAX_BYTES} bytes"
        )
    if report.num_sequences != batch_size:
        raise RemoteProtocolError(
            f"step report: {report.num_sequences} sequences, the plan has {batch_size}"
        )
    if not LEAST_LOSS <= report.loss <= MAX_LOSS:
        raise RemoteProtocolError(f"step report: loss {report.loss:g}, outside 0..{MAX_LOSS:g}")
    for seconds in (report.compute_s, report.wait_s):
        if not 0.0 <= seconds <= MAX_SECONDS:
            raise RemoteProtocolError(f"step report: {seconds:g} s, outside 0..{MAX_SECONDS:g}")


def check_ready(ready: Ready) -> None:
    """Refuse numbers of rows and samples that no device has; the rest is for those who admit it."""
    counts = ready.num_samples, ready.left_out, ready.cut
    if min(counts) < 0 or max(counts) > MAX_SAMPLES or ready.cut > ready.num_samples:
        raise RemoteProtocolError(
            f"Ready: samples, rows left out and samples cut are {counts}, which no device has"
        )


def check_evaluation(report: EvalReport) -> None:
    """Refuse an evaluation with impossible counts, or a loss that no model has."""
    if not 0 <= report.num_correct <= report.num_targets <= MAX_TARGETS:
        raise RemoteProtocolError(
            f"evaluation: {report.num_correct} of {report.num_targets} targets correct"
        )
    targets = max(1, report.num_targets)
    if not LEAST_LOSS * targets <= report.loss_sum <= MAX_LOSS * targets:
        raise RemoteProtocolError(
            f"evaluation: loss {report.loss_sum:g} of {report.num_targets} targets, outside "
            f"0..{MAX_LOSS:g} for each"
        )


def check_importance(plan: Plan, importance: Mapping[str, float]) -> None:
    """Refuse importance of weights that are not in the plan, or of an impossible size."""
    for name, value in importance.items():
        if name not in plan.ranks:
            raise RemoteProtocolError(f"importance of {name[:60]!r}, which is not in the plan")
        if not 0.0 <= value <= MAX_IMPORTANCE:
            raise RemoteProtocolError(
                f"importance of {name!r}: {value}, outside 0..{MAX_IMPORTANCE:g}"
            )


def check_upload(
    message: AdapterUpload,
    tensors: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    most: float,
    *,
    is_due: bool,
) -> None:
    """Refuse an upload that does not hold exactly what the plan says, or numbers beyond all.

    What is not finite, and what is too much for the round, is judged with what the others bring
    (`coordinator/aggregation/screening.py`), unless the device cannot be done with its steps.

    Args:
        message: The message.
        tensors: What came with it.
        shapes: What is due.
        most: Largest number that anything honest can have.
        is_due: Whether the device can be done with its steps.
    """
    check_shapes(message, tensors, shapes)
    for name, tensor in tensors.items():
        if not is_due:
            require_finite(tensor, f"upload {name!r}")
        size = largest([tensor])
        if most < size < math.inf:
            raise NumericError(f"upload {name!r}: numbers up to {size:.2g} are beyond all measure")
