"""A device with its labels at home asks for the positions that it needs, and for no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from edge_sdk.client.steps import Steps
from edge_sdk.data.batches import MicroBatch, StepBatch
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import find_layout
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import (
    Activation,
    Gradient,
    Part,
    Stamp,
    TopGradient,
    TopHidden,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.protocol.positions import from_runs
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.tiny import BLOCKS, VOCAB, make_config, make_model, make_parts

HIDDEN, SPLIT = 32, 2
PLAN = Plan(split=SPLIT, ranks={}, alphas={}, batch_size=2, micro_batch=2, tail=True)
WELCOME = Welcome(
    stamp=Stamp(),
    protocol=1,
    sdk_version="0",
    model_hash="",
    num_blocks=BLOCKS,
    files=Part(name="files", sha256="0" * 64, num_bytes=0),
    task="causal-lm",
    labels="device",
    codec="float32",
    max_length=16,
    num_labels=0,
    vocab_size=VOCAB,
    pad_id=1,
    training={},
    lora={},
)


class Sent(NamedTuple):
    """A message and its tensors."""

    message: Any
    tensors: Mapping[str, Any]


class Coordinator:
    """The link and the inbox of a device whose coordinator sends back what it is sent.

    It stands for blocks that do nothing, with and without what this version knows of positions.
    """

    def __init__(self, *, knows_wishes: bool) -> None:
        self.knows_wishes = knows_wishes
        self.sent: list[Sent] = []

    def send(self, message: Any, tensors: Mapping[str, Any]) -> None:
        """Keep what the device sends."""
        self.sent.append(Sent(message, {n: array for n, (array, _) in tensors.items()}))

    def wait_for_first(self, due: Mapping[type, int | None], stamp: Stamp) -> Envelope:
        """Answer what is due first."""
        kind = TopHidden if TopHidden in due else Gradient
        return self.wait_for_reply(kind, stamp, due[kind])

    def wait_for_reply(self, kind: type, stamp: Stamp, micro: int | None) -> Envelope:
        """Answer as the last activation calls for."""
        assert micro is not None
        sent = next(s for s in reversed(self.sent) if isinstance(s.message, Activation))
        hidden_BTD = sent.tensors["hidden"]
        if kind is Gradient:
            answer: Any = Gradient(stamp=stamp, micro=micro, loss_sum=0.0)
            return Envelope(answer, {"grad": np.zeros_like(hidden_BTD)})
        hidden = hidden_BTD
        if self.knows_wishes and sent.message.wanted:
            hidden = hidden_BTD[from_runs(sent.message.wanted, *hidden_BTD.shape[:2])]
        return Envelope(TopHidden(stamp=stamp, micro=micro), {"hidden": hidden})

    def gradient(self) -> Any:
        """Return the gradient that the device has sent."""
        (found,) = [s for s in self.sent if isinstance(s.message, TopGradient)]
        return found.tensors["grad"]


def make_micro(*, has_targets: bool = True) -> MicroBatch:
    """Two sequences of prompt and completion."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 9)).astype(np.int64)
    labels = np.where(np.arange(9)[None] >= [[6], [4]], ids, -100)
    labels[1, 7:] = -100
    if not has_targets:
        labels[:] = -100
    return MicroBatch(ids, np.array([9, 7], np.int32), labels)


def make_steps(coordinator: Coordinator) -> Steps:
    """A device with the head of a tiny model."""
    config = make_config("llama")
    layout = find_layout(config, "causal-lm")
    torch.manual_seed(0)
    model = make_model(config, "causal-lm")
    parts = make_parts(model, layout, ["front", "block.0", "block.1", "tail"])
    runtime = TorchRuntime(
        config,
        "causal-lm",
        layout,
        parts,
        replace(PLAN, ranks=dict.fromkeys(["model.layers.0.self_attn.q_proj"], 2), alphas={}),
        LoraConfig(),
        TrainingConfig(),
        10,
        device="cpu",
    )
    link: Any = coordinator
    return Steps(runtime, PLAN, WELCOME, link, link)


def train(coordinator: Coordinator, micro: MicroBatch) -> float:
    """Do a step; return its loss."""
    batch = StepBatch(0, (micro,), max(1, micro.num_targets), micro.num_tokens)
    return make_steps(coordinator).train(batch, Stamp(step=0), 0).loss


def test_what_travels_is_where_targets_are_predicted() -> None:
    """Of 18 positions six are named and six gradients sent, with the loss of all."""
    new, old = Coordinator(knows_wishes=True), Coordinator(knows_wishes=False)

    losses = [train(who, make_micro()) for who in (new, old)]

    assert losses[0] == losses[1] > 0
    assert new.sent[0].message.wanted == (5, 8, 12, 15)
    assert new.gradient().shape == (6, HIDDEN)
    assert old.gradient().shape == (2, 9, HIDDEN)
    where = make_micro().predicts
    assert where is not None
    assert np.array_equal(new.gradient(), old.gradient()[where])
    assert not old.gradient()[~where].any()


def test_an_evaluation_asks_for_the_same() -> None:
    """Loss and hits are those of a coordinator that sends everything."""
    found = []
    for knows_wishes in (True, False):
        coordinator = Coordinator(knows_wishes=knows_wishes)
        steps = make_steps(coordinator)
        found.append(steps._evaluate_micro(make_micro(), 0))

    assert found[0] == found[1]
    assert found[0].num_targets == 6


def test_without_a_target_something_travels() -> None:
    """One position, whose gradient is zero."""
    coordinator = Coordinator(knows_wishes=True)

    train(coordinator, make_micro(has_targets=False))

    assert coordinator.sent[0].message.wanted == (0, 1)
    assert coordinator.gradient().shape == (1, HIDDEN)
    assert not coordinator.gradient().any()


def test_a_tail_that_looks_around_asks_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is named, and the whole state is used."""
    coordinator = Coordinator(knows_wishes=True)
    monkeypatch.setattr(TorchRuntime, "has_local_tail", False)

    train(coordinator, make_micro())

    assert coordinator.sent[0].message.wanted == ()
    assert coordinator.gradient().shape == (2, 9, HIDDEN)


def test_more_or_fewer_positions_than_were_asked_for_are_refused() -> None:
    """The device takes what it has named, or everything."""
    coordinator = Coordinator(knows_wishes=True)
    answer = coordinator.wait_for_reply

    def fewer(kind: type, stamp: Stamp, micro: int | None) -> Envelope:
        envelope = answer(kind, stamp, micro)
        return Envelope(envelope.message, {n: a[:-1] for n, a in envelope.tensors.items()})

    coordinator.wait_for_reply = fewer  # type: ignore[method-assign]

    with pytest.raises(RemoteProtocolError, match=r"'hidden': \(5, 32\), allowed: \(6, 32\)"):
        train(coordinator, make_micro())
