"""Prove that a model cut into slices computes what the whole one does, before a run relies on it.

A narrow stand-in of the model (`shrunk.py`) runs once as transformers runs it and once as devices
and coordinator do: slices that hold only their own parts, at every kind of cut, with padding, in
training and in evaluation, the tail at single positions where it looks at no others. Logits and
gradients must agree. Knows no files and no network.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_sdk.errors import EdgeError, ModelError, is_out_of_memory, one_line
from edge_sdk.model.layout import Layout, Task, auto_class, build_empty, building, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.shrunk import FIRST_SPECIAL, block_kinds, shrink, silenced, with_blocks

log = logging.getLogger(__name__)

# Largest difference, relative to the norm of what is compared; usually there is none at all.
BOUND = 1e-6
# Parameters beyond which a stand-in is too large to be run in a moment.
MOST = 50_000_000
# Numbers of the real weights that are looked at: more would cost seconds, and memory that counts,
# four bytes for each and as much for each of two gradients.
MOST_NUMBERS = 60_000_000
# Tokens of the rows: padding is in the batch, and one row has none.
LENGTHS = (9, 4, 7)

Parts = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Batch:
    """Rows of random tokens."""

    ids_BT: torch.Tensor
    lengths_B: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Return (B, T): 1 where a token is, 0 where padding is."""
        return (torch.arange(self.ids_BT.shape[1])[None] < self.lengths_B[:, None]).long()

    def pooled(self, pad_id: int) -> torch.Tensor:
        """Return (B,): where a decoder with a classification head looks; see `MicroBatch`."""
        return (torch.arange(self.ids_BT.shape[1]) * (self.ids_BT != pad_id)).amax(1).int()


@dataclass(frozen=True)
class Found:
    """What one way to compute has come to."""

    logits: torch.Tensor
    """Logits of real tokens, or of rows."""
    grads: Mapping[str, torch.Tensor]
    """Gradients of the blocks' parameters, by whole-model name; none in evaluation."""


def check_split(config: Any, task: Task) -> None:
    """Compare split and whole on a narrow stand-in of the model of *config*.

    Raises:
        ModelError: they differ, or the split does not run; the message says why.
    """
    with building, _own_random_numbers(), _in_one_line(config):
        small = shrink(config, task)
        layout = find_layout(small, task)
        if sum(p.numel() for p in build_empty(small, task, torch.float32).parameters()) > MOST:
            log.warning("split.unchecked reason=%s", "the model cannot be made narrow")
            return
        model = _whole(small, task)
        state = model.state_dict()
        parts = {p: {n: state[n] for n in layout.part(p)} for p in layout.part_names()}
        _compare(model, _Pieces(model, small, task, layout, parts))


def check_weights(
    config: Any, task: Task, layout: Layout, tensors: Callable[[str], Mapping[str, torch.Tensor]]
) -> str:
    """Compare split and whole on the first and the last block with their own weights.

    Args:
        config: The model's configuration.
        task: What the model is used for.
        layout: The model's layout.
        tensors: Returns the tensors of a part of the model.

    Returns:
        Why they were not compared, or nothing.

    Raises:
        ModelError: they differ, or the split does not run; the message says why.
    """
    last = layout.num_blocks - 1
    if last < 1:
        return "it has one block"
    stored = {name: tensors(name) for name in ("front", "block.0", f"block.{last}", "tail")}
    with building, _own_random_numbers(), _in_one_line(config):
        short = silenced(with_blocks(config, (0, last), last + 1))
        try:
            own = find_layout(short, task)
            model: Any = build_empty(short, task, torch.float32)
        except ModelError:
            return "its blocks cannot stand alone"
        named = _as_short(stored, own, layout.blocks_path, last)
        state = {name: tensor for part in named.values() for name, tensor in part.items()}
        wanted = model.state_dict()
        if any(n not in state or state[n].shape != wanted[n].shape for n in _names(own)):
            return "its first and last block do not fit together"
        if sum(tensor.numel() for tensor in state.values()) > MOST_NUMBERS:
            return "its blocks are too large for a quick look"
        parts = {part: {n: _wide(t) for n, t in held.items()} for part, held in named.items()}
        for held in parts.values():
            model.load_state_dict(held, strict=False, assign=True)
        model.tie_weights()
        _compare(model, _Pieces(model, short, task, own, parts))
    return ""


def _names(layout: Layout) -> list[str]:
    return [name for part in layout.part_names() for name in layout.part(part)]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@contextmanager
def _in_one_line(config: Any) -> Iterator[None]:
    """Turn what somebody else's model code raises into an error of ours."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = getattr(config, "model_type", type(config).__name__)
        raise ModelError(f"a model of type {kind!r} cannot be split: {_said(error)}") from error


def _compare(model: nn.Module, pieces: _Pieces) -> None:
    try:
        _compare_with(model, pieces, seed=1)
    except _Differs:
        # Where two experts are nearly even a router may choose the other one, but not twice.
        _compare_with(model, pieces, seed=2)


class _Differs(ModelError):
    """Split and whole compute different numbers."""


def _whole(config: Any, task: Task) -> nn.Module:
    """Return the model as transformers makes it, with random weights of a size that shows."""
    factory = auto_class(config, task)
    torch.manual_seed(0)
    model: nn.Module = factory.from_config(
        copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
    )
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in {id(t): t for t in tensors if t.is_floating_point()}.values():
        with torch.no_grad():
            _shake(tensor)
    return model


def _shake(tensor: torch.Tensor) -> None:
    """Move *tensor* away from what it starts with: zeros and ones hide what is left out."""
    if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
        tensor.add_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    elif isinstance(tensor, nn.Parameter):
        tensor.add_(torch.randn_like(tensor) * 0.1)


def _compare_with(model: nn.Module, pieces: _Pieces, seed: int) -> None:
    kind = type(model).__name__
    batch = _batch(pieces.config, pieces.task, seed)
    model.requires_grad_(False)
    model.get_submodule(pieces.layout.blocks_path).requires_grad_(True)
    for training in (True, False):
        model.train(training)
        with _running(f"{kind} does not run in transformers itself"):
            wanted = _run_whole(model, batch, pieces.task, pieces.layout, training=training)
        for name, route in pieces.routes():
            with _running(f"{kind} does not run {name}"):
                found = pieces.run(route, batch, training=training)
            _agree(kind, name, found, wanted)


@contextmanager
def _running(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # somebody else's model code may raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what}: {_said(error)}") from error


def _batch(config: Any, task: Task, seed: int) -> Batch:
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    most = min(FIRST_SPECIAL, text.vocab_size)
    shape = (len(LENGTHS), max(LENGTHS))
    batch = Batch(torch.randint(3, most, shape, generator=generator), torch.tensor(LENGTHS))
    batch.ids_BT[batch.mask() == 0] = _pad_id(config)
    if task != "causal-lm":
        batch.ids_BT[1, 1 : LENGTHS[1] : 2] = _pad_id(config)  # some texts hold it, or end in it
    return batch


def _pad_id(config: Any) -> int:
    return getattr(config.get_text_config(), "pad_token_id", None) or 0


def _run_whole(
    model: nn.Module, batch: Batch, task: Task, layout: Layout, *, training: bool
) -> Found:
    """Run the model as transformers does, with its own cache where it has one by default."""
    model.zero_grad()
    with torch.set_grad_enabled(training):
        logits = _logits(model, batch)
    logits = _real(logits, batch, task)
    if training:
        torch.autograd.backward(_loss(logits))
    named = dict(model.named_parameters(remove_duplicate=False))
    names = [n for own in layout.blocks for n in own if n in named]
    grads = {n: g for n in names if (g := named[n].grad) is not None}
    model.zero_grad()  # nobody else holds them
    return Found(logits.detach(), grads)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Run the model as it comes: with a cache of past tokens, unless its own code fails so."""
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask()}
    try:
        found: torch.Tensor = model(**inputs).logits
    except Exception:  # noqa: BLE001 - somebody else's model code may raise anything
        found = model(**inputs, use_cache=False).logits
    return found


def _real(logits: torch.Tensor, batch: Batch, task: Task) -> torch.Tensor:
    """Return the logits that count: nobody looks at those of padding."""
    return logits[batch.mask().bool()] if task == "causal-lm" else logits


def _loss(logits: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (logits * torch.randn(logits.shape, generator=generator)).sum()


Step = tuple[str, int, int]
"""Slice, first block, block before which it ends; beyond the last block: with the tail."""


class _Pieces:
    """The slices of all parties, and the ways on which a batch passes through them."""

    def __init__(
        self, model: nn.Module, config: Any, task: Task, layout: Layout, parts: Parts
    ) -> None:
        self.config, self.task, self.layout = config, task, layout
        self._parts = parts
        self._pad_id = _pad_id(config)
        self._slices: dict[str, Slice] = {}
        blocks: Any = model.get_submodule(layout.blocks_path)
        self._cuts = _kinds_of_cuts(block_kinds(list(blocks)), layout)

    def routes(self) -> Iterator[tuple[str, list[Step]]]:
        """Yield ways through the slices of a device and a coordinator, each with its name."""
        last = self.layout.num_blocks
        for cut in self._cuts:
            if cut < last:
                yield f"cut after block {cut - 1}", [("device", 0, cut), ("server", cut, last + 1)]
        cut = self._cuts[0]
        if cut < last:
            stops = [*self._cuts[1:], last]
            middle = [("middle", k, s) for k, s in zip(self._cuts, stops, strict=True) if k < s]
            ends = [("device with tail", 0, cut), ("device with tail", last, last + 1)]
            yield (
                f"cut after block {cut - 1}, with the head on the device",
                [ends[0], *middle, ends[1]],
            )

    def run(self, route: Sequence[Step], batch: Batch, *, training: bool) -> Found:
        """Pass *batch* on *route* as it does in a run; every slice sees only what it is sent."""
        last, cut = self.layout.num_blocks, route[0][2]
        hidden: torch.Tensor | None = None
        sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        ids_BT = batch.ids_BT if self.layout.needs_ids else None
        slices = {who: self._slice(who, cut) for who, _, _ in route}
        for slice_ in slices.values():
            slice_.model.train(training)
            slice_.model.zero_grad()
        with torch.set_grad_enabled(training):
            for who, first, stop in route:
                if hidden is None:
                    output = slices[who].front(batch.ids_BT, batch.lengths_B, stop)
                elif stop > last:
                    output = self._logits(slices[who], first, hidden, batch)
                else:
                    output = slices[who].middle(hidden, batch.lengths_B, first, stop, ids_BT)
                hidden = output.detach().requires_grad_(training)
                sent.append((output, hidden))
            logits = sent[-1][0]
            if training:
                torch.autograd.backward(_loss(logits))
                for output, received in reversed(sent[:-1]):
                    torch.autograd.backward(output, received.grad)
        grads = self._grads(slices.values())
        for slice_ in slices.values():
            slice_.model.zero_grad()
        return Found(logits.detach(), grads)

    def _logits(
        self, slice_: Slice, first: int, hidden_BTD: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Return the logits that count, by the way that a run takes to them.

        A tail that looks at one position at a time is given nothing but the positions that count.
        """
        last, lengths_B = self.layout.num_blocks, batch.lengths_B
        ids_BT = batch.ids_BT if self.layout.needs_ids else None
        if slice_.has_local_tail:
            if first < last:
                hidden_BTD = slice_.middle(hidden_BTD, lengths_B, first, last, ids_BT)
            return slice_.at_positions(hidden_BTD[batch.mask().bool()])
        pooled_B = batch.pooled(self._pad_id) if self.task != "causal-lm" else None
        logits = slice_.logits(hidden_BTD, lengths_B, first, pooled_B, ids_BT)
        return _real(logits, batch, self.task)

    def _grads(self, slices: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for slice_ in slices:
            for name, parameter in slice_.model.named_parameters():
                if parameter.grad is not None:  # blocks on both sides may have a weight in common
                    found[name] = found[name] + parameter.grad if name in found else parameter.grad
        return found

    def _slice(self, who: str, cut: int) -> Slice:
        """Return the slice of *who* where the device holds *cut* blocks."""
        key = f"{who} {cut}"
        if key not in self._slices:
            self._slices[key] = self._build(who, cut)
        return self._slices[key]

    def _build(self, who: str, cut: int) -> Slice:
        layout = self.layout
        own = [f"block.{i}" for i in range(layout.num_blocks)]
        held = {
            "device": ["front", *own[:cut]],
            "device with tail": ["front", *own[:cut], "tail"],
            "middle": ["late", *own[cut:]],
            "server": ["late", *own[cut:], *(["front"] * layout.tail_needs_front), "tail"],
        }[who]
        slice_ = Slice(self.config, self.task, layout, torch.float32)
        front = self._parts["front"]
        late = {name: front[name] for name in layout.late}
        for name in held:
            slice_.add(name, late if name == "late" else self._parts[name])
        for index, name in enumerate(own):
            if name in held:
                slice_.blocks[index].requires_grad_(True)
        return slice_


def _as_short(stored: Parts, short: Layout, path: str, last: int) -> dict[str, Any]:
    """Return the parts of a model with *last* as its second block, under its names."""
    old, new = f"{path}.{last}.", f"{path}.1."
    every = {
        f"{new}{name.removeprefix(old)}" if name.startswith(old) else name: tensor
        for part in stored.values()
        for name, tensor in part.items()
    }
    return {
        part: {name: every[name] for name in short.part(part) if name in every}
        for part in short.part_names()
    }


def _kinds_of_cuts(kinds: Sequence[int], layout: Layout) -> list[int]:
    """Return the first legal cut of every kind: which block comes before it and which after."""
    seen: dict[tuple[int, int], int] = {}
    for cut in layout.cuts:
        if cut < len(kinds):
            seen.setdefault((kinds[cut - 1], kinds[cut]), cut)
    return list(seen.values()) or [len(kinds)]


def _agree(kind: str, name: str, found: Found, wanted: Found) -> None:
    _same(kind, f"logits {name}", found.logits, wanted.logits)
    for weight in sorted({*found.grads, *wanted.grads}):
        here, there = found.grads.get(weight), wanted.grads.get(weight)
        if here is None or there is None:
            where = "pieces alone" if there is None else "whole model alone"
            raise _Differs(f"{kind}: {weight!r} has a gradient in the {where}")
        _same(kind, f"the gradient of {weight!r} {name}", here, there)


def _same(kind: str, what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not difference <= BOUND:
        raise _Differs(
            f"{kind} does not compute the same in pieces: {what} differ by {difference:.0e}"
        )


def _said(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:300]


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the random numbers of this process as they are."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)
