"""A step and an evaluation of one device, read from top to bottom in `_train_waves`.

Legend: B sequences, C of them whose state is sent, T positions, D hidden size, W positions whose
final hidden state is wanted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from edge_sdk.client.incoming import Inbox
from edge_sdk.client.replaying import Replaying, without
from edge_sdk.client.setup import as_int32
from edge_sdk.data.batches import MicroBatch, StepBatch, eval_batches
from edge_sdk.data.tokenize import Example
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.held_states import HeldStates
from edge_sdk.lora.factors import Array
from edge_sdk.protocol import residual
from edge_sdk.protocol.codecs import require_finite
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import (
    Activation,
    EvalReport,
    EvalResult,
    Gradient,
    Resend,
    Stamp,
    StepReport,
    TopGradient,
    TopHidden,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.protocol.positions import Mask, to_runs
from edge_sdk.protocol.roomy import RoomyCodec
from edge_sdk.protocol.tensors import Shape, check_shapes
from edge_sdk.runtime.interface import Runtime, TailSums
from edge_sdk.transport.link import Link

log = logging.getLogger(__name__)


class _Sent(NamedTuple):
    """A micro-batch that may have to be sent again."""

    hidden_CTD: Array | None
    """States of the sequences that are not replayed; None where all are."""
    batch: MicroBatch
    num_micro: int
    num_targets: int
    replays: tuple[int, ...] = ()
    """Sequences whose state the coordinator has kept."""


class Steps:
    """The device's half of every micro-batch, and the messages around it."""

    def __init__(
        self,
        runtime: Runtime,
        plan: Plan,
        welcome: Welcome,
        link: Link,
        inbox: Inbox,
        held: HeldStates | None = None,
    ) -> None:
        """Take part with *runtime* under *plan*.

        Args:
            runtime: What computes the device's blocks.
            plan: What the device runs.
            welcome: What the run is about; its codec is that of the plan.
            link: To the coordinator.
            inbox: What comes from there.
            held: What both sides hold of the samples, with the codec `residual`.
        """
        self._runtime, self._plan, self._held = runtime, plan, held
        self._sent: dict[int, _Sent] = {}
        """Micro-batches under way whose changes the coordinator may not understand."""
        form: Any = welcome.importance
        # Without a backward pass there is nothing to measure.
        every = 0 if plan.is_forward_only else welcome.importance_every
        runtime.state.meter.measure(form, every)
        self._link, self._inbox = link, inbox
        self._codec, self._roomy = welcome.codec, RoomyCodec()
        is_short = held is not None and max(welcome.vocab_size, welcome.num_labels) < 2**15
        self._label_codec = "int16" if is_short else "int32"
        self._keeps_labels = welcome.labels == "device"
        # Every block is here: the coordinator computes nothing.
        self._is_whole = plan.split == welcome.num_blocks
        self._sends_ids = welcome.wants_ids
        if self._sends_ids and self._keeps_labels:
            raise RemoteProtocolError("asked for the token ids, which `labels: device` keeps here")
        if self._sends_ids and not self._is_whole:
            log.info("ids.travel reason=%s", "the coordinator's blocks need the token ids")
        self.replaying = Replaying(is_asked=welcome.replays and plan.is_forward_only)
        self._width = 0
        """D, once a hidden state has been computed."""
        self._stamp = welcome.stamp
        self._waited_s = 0.0

    def train(self, batch: StepBatch, stamp: Stamp, schedule_step: int) -> StepReport:
        """Do one optimizer step of the device, with the rate of *schedule_step*; report on it."""
        self._stamp = stamp
        runtime = self._runtime
        began, self._waited_s, self.replaying.is_used = time.monotonic(), 0.0, False
        loss_sum = self._train_alone(batch) if self._is_whole else self._train_waves(batch)
        runtime.step(schedule_step)
        spent = time.monotonic() - began
        return StepReport(
            stamp=self._stamp,
            loss=loss_sum / batch.num_targets,
            num_targets=batch.num_targets,
            num_sequences=self._plan.batch_size,
            num_tokens=batch.num_tokens,
            compute_s=max(0.0, spent - self._waited_s),
            wait_s=self._waited_s,
            peak_bytes=runtime.memory_in_use().peak_bytes,
        )

    def _train_alone(self, step: StepBatch) -> float:
        """Train without the coordinator; return the sum of the losses."""
        return sum(
            self._runtime.local(batch, step.num_targets, step.step, index).loss_sum
            for index, batch in enumerate(step.micro_batches)
        )

    def _train_waves(self, step: StepBatch) -> float:
        """Send micro-batches through a model that is mostly elsewhere; return the sum of losses.

        While the coordinator has one of them, others are computed here: the next ones forward, and
        with the labels here the loss of whichever comes back first.
        """
        loss_sum, shapes = 0.0, list[tuple[int, ...]]()
        self._sent.clear()
        coming = iter(enumerate(step.micro_batches))
        tops = grads = 0
        while grads < len(step.micro_batches):
            for index, batch in islice(coming, self._plan.in_flight - (len(shapes) - grads)):
                shapes.append(self._begin_micro(batch, index, step))
            due: dict[type[Any], int] = {}
            if self._keeps_labels and tops < len(shapes):
                due[TopHidden] = tops
            if not self._keeps_labels or grads < tops:
                due[Gradient] = grads
            answer = self._wait(due)
            index = answer.message.micro
            if isinstance(answer.message, TopHidden):  # the coordinator's blocks
                loss_sum += self._end_loss(answer, step.micro_batches[index], step, shapes[index])
                tops += 1
            else:  # the coordinator's backward pass
                loss_sum += answer.message.loss_sum
                if not self._plan.is_forward_only:
                    self._runtime.backward(_checked(answer, "grad", shapes[index]))
                self._sent.pop(index, None)
                self.replaying.answered(step.micro_batches[index], kept=answer.message.kept)
                grads += 1
        return loss_sum

    def _begin_micro(self, batch: MicroBatch, index: int, step: StepBatch) -> tuple[int, ...]:
        """Send a micro-batch on its way; return the shape of its hidden state."""
        replays, hidden_CTD = self.replaying.rows(batch), None
        if len(replays) < len(batch.lengths):
            rest = without(batch, replays)
            hidden_CTD = self._runtime.forward(rest, step.step, index)  # the device's blocks
            self._width = hidden_CTD.shape[2]
        sent = _Sent(hidden_CTD, batch, len(step.micro_batches), step.num_targets, replays)
        if self._held is not None:
            self._sent[index] = sent
        self._send_activation(sent, index)
        return *batch.input_ids.shape, self._width

    def _end_loss(
        self, answer: Envelope, batch: MicroBatch, step: StepBatch, shape: tuple[int, ...]
    ) -> float:
        """Take the loss of a final hidden state, and send its gradient; return the loss."""
        top = _Top(answer, shape, self._wanted(batch))
        sums, grad_BTD = self._runtime.tail(top.hidden_BTD, batch, step.num_targets)
        message = TopGradient(stamp=self._stamp, micro=answer.message.micro)
        grad = self._coded(top.as_it_came(grad_BTD), "gradient", residual.TOP_GRADIENT)
        self._link.send(message, {"grad": grad})
        return sums.loss_sum

    def _send_activation(self, sent: _Sent, index: int, *, is_eval: bool = False) -> None:
        batch, starts = sent.batch, tuple[int, ...]()
        tensors: dict[str, TensorOut] = {"lengths": (as_int32(batch.lengths), "int32")}
        samples = self._named_samples(sent, is_eval=is_eval)
        if sent.hidden_CTD is not None:
            require_finite(sent.hidden_CTD, f"activation of step {self._stamp.step}")
            if self._held is None or is_eval or samples:
                what = f"hidden states after block {self._plan.split - 1}"
                tensors["hidden"] = self._coded(sent.hidden_CTD, what, residual.WHOLE)
            else:
                self._held.begin_step(self._stamp.step)
                lengths, samples = batch.lengths.tolist(), batch.samples
                coded, starts = residual.code(sent.hidden_CTD, lengths, samples, self._held)
                tensors |= coded
        pooled: tuple[int, ...] = ()
        if not self._keeps_labels:
            tensors["labels"] = (as_int32(batch.labels), self._label_codec)
            if batch.pooled is not None and (batch.pooled != batch.lengths - 1).any():
                pooled = tuple(map(int, batch.pooled))
        wanted = self._wanted(batch)
        if self._sends_ids:
            tensors["ids"] = (as_int32(batch.input_ids), "int32")
        self._link.send(
            Activation(
                stamp=self._stamp,
                micro=index,
                num_micro=sent.num_micro,
                num_targets=sent.num_targets,
                is_eval=is_eval,
                pooled=pooled,
                samples=samples,
                starts=starts,
                wanted=() if wanted is None else to_runs(wanted),
                replays=sent.replays,
            ),
            tensors,
        )

    def _wanted(self, batch: MicroBatch) -> Mask | None:
        """Return where the tail needs the final hidden state; None: everywhere, or nowhere here."""
        if not self._keeps_labels or not self._runtime.has_local_tail:
            return None
        wanted_BT = batch.predicts
        if wanted_BT is not None and not wanted_BT.any():
            wanted_BT[0, 0] = True  # something has to travel
        return wanted_BT

    def _named_samples(self, sent: _Sent, *, is_eval: bool) -> tuple[int, ...]:
        """Return the samples whose states may be kept, or have been."""
        if sent.replays:
            return sent.batch.samples
        return () if is_eval else self.replaying.samples(sent.batch, self._runtime)

    def _wait(self, due: Mapping[type[Any], int]) -> Envelope:
        began = time.monotonic()
        while True:
            envelope = self._inbox.wait_for_first({**due, Resend: None}, self._stamp)
            if not isinstance(envelope.message, Resend):
                break
            self._send_whole(envelope.message.micro)
        self._waited_s += time.monotonic() - began
        return envelope

    def _send_whole(self, micro: int) -> None:
        """Send a micro-batch again, of which the coordinator holds something else than we do."""
        if self._held is None or micro not in self._sent:
            raise RemoteProtocolError(
                f"asked again for micro-batch {micro}, which is not under way"
            )
        sent = self._sent[micro]
        log.info("residual.whole step=%d micro=%d", self._stamp.step, micro)
        self._held.forget(sent.batch.samples)
        self._send_activation(sent, micro)

    def evaluate(self, examples: Sequence[Example], pad_id: int, stamp: Stamp) -> EvalReport:
        """Go through the private validation data; report zeros when there is none."""
        self._stamp = stamp
        loss_sum, targets, correct = 0.0, 0, 0
        if examples:
            for index, batch in enumerate(
                eval_batches(examples, self._plan.micro_batch, pad_id=pad_id)
            ):
                sums = self._evaluate_micro(batch, index)
                loss_sum += sums.loss_sum
                targets += sums.num_targets
                correct += sums.num_correct
        return EvalReport(
            stamp=self._stamp, loss_sum=loss_sum, num_targets=targets, num_correct=correct
        )

    def _evaluate_micro(self, batch: MicroBatch, index: int) -> TailSums:
        runtime = self._runtime
        hidden_BTD = runtime.forward_eval(batch)
        if self._is_whole:
            return runtime.tail_eval(hidden_BTD, batch)
        sent = _Sent(hidden_BTD, batch, 1, batch.num_targets)
        self._send_activation(sent, index, is_eval=True)
        if self._keeps_labels:
            answer = self._inbox.wait_for_reply(TopHidden, self._stamp, index)
            top = _Top(answer, hidden_BTD.shape, self._wanted(batch))
            return runtime.tail_eval(top.hidden_BTD, batch)
        result: EvalResult = self._inbox.wait_for_reply(EvalResult, self._stamp, index).message
        return TailSums(result.loss_sum, result.num_targets, result.num_correct)

    def _coded(self, array: Array, what: str, own: str) -> TensorOut:
        """Return what is to be sent whole; *own* is its codec beside changes."""
        name = residual.plain(self._codec, own)
        return array, self._roomy.choose(name, array, what)


class _Top:
    """The final hidden state, as it came: of the positions that were wanted, or of all."""

    def __init__(self, answer: Envelope, shape: Shape, wanted_BT: Mask | None) -> None:
        # A coordinator of version 0.1.0 knows of no wishes.
        is_whole = wanted_BT is None or len(answer.tensors["hidden"].shape) == len(shape)
        self._where = None if is_whole else wanted_BT
        if self._where is None:
            self.hidden_BTD = _checked(answer, "hidden", shape)
        else:
            hidden_WD = _checked(answer, "hidden", (int(self._where.sum()), shape[-1]))
            self.hidden_BTD = np.zeros(shape, dtype=np.float32)
            self.hidden_BTD[self._where] = hidden_WD

    def as_it_came(self, array_BTD: Array) -> Array:
        """Return those positions of *array_BTD* that the coordinator has sent."""
        return array_BTD if self._where is None else array_BTD[self._where]


def _checked(answer: Envelope, name: str, shape: Shape) -> Array:
    """Return tensor *name*, which must have the shape of what was sent, and be finite."""
    check_shapes(answer.message, answer.tensors, {name: shape})
    require_finite(answer.tensors[name], f"{name} from the coordinator")
    return answer.tensors[name]
