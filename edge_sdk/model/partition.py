"""Run any stretch of blocks of a transformers model by its own code; docs/method.md, Partition.

Every parameter keeps its whole-model name; absent blocks take no memory. Which tensors belong to
which part is found in `layout.py`; knows no files and no network.

Legend: B sequences, T positions, D hidden size, N single positions, V vocabulary or classes, L
blocks of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import ModelError, is_out_of_memory, one_line
from edge_sdk.model.experts import expert_weights, find_stack, take_place
from edge_sdk.model.layout import Layout, Task, build_empty
from edge_sdk.model.quantized import Quantized, quantize_linears, take_weight
from edge_sdk.model.safetensors_files import drop_pages
from edge_sdk.model.weightless import hidden_of

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
# Rows on which a tail is tried: some of their positions alone, and in another order.
TRIED_LENGTHS, TRIED = (5, 3), ((0, 1), (1, 2), (0, 4), (1, 0))
# Largest relative difference of their logits that comes from rounding, in float32 and in less.
LOCAL_BOUND, LOCAL_HALF_BOUND = 1e-4, 3e-2


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Unwinds the model's forward once the last wanted block has answered."""

    def __init__(self, hidden_BTD: torch.Tensor) -> None:
        self.hidden_BTD = hidden_BTD


class Slice:
    """A model of which only some parts are present; runs any stretch of the present blocks.

    Every parameter keeps its whole-model name. Absent blocks lie on the meta device; absent
    parameters outside the blocks are views of a single zero, so that the model's own code around
    a stretch (masks, positions, a look-up whose result is thrown away) runs without their memory.
    """

    def __init__(
        self,
        config: Any,
        task: Task,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device = CPU,
        quantized: Quantized | None = None,
    ) -> None:
        self.model = build_empty(config, task, dtype)
        self.layout = layout
        self.task = task
        self.dtype = dtype
        self.device = device
        self.present: set[str] = set()
        self._sources: dict[str, Mapping[str, torch.Tensor]] = {}
        """Where each tensor of a block came from, to be read again."""
        self.is_quantized = quantized is not None
        """Whether linear layers of its blocks are kept in 8 or 4 bits."""
        path, _, self._list_name = layout.blocks_path.rpartition(".")
        self._list_owner = self.model.get_submodule(path)
        self.blocks: list[nn.Module] = list(self._list_owner._modules[self._list_name].children())  # type: ignore[union-attr]
        whole_config: Any = self.model.config
        self._config = whole_config.get_text_config()
        self.pad_id: int = self._config.pad_token_id or 0
        self.vocab_size: int = self._config.vocab_size
        self._has_local_tail: bool | None = None
        for block in self.blocks:
            block.to("meta")
            if quantized:
                quantize_linears(block, quantized)
        if quantized:
            for name in expert_weights(self.model):
                take_place(self.model, name, device).quantize(quantized)
        for name in (*layout.front, *layout.tail):
            _set_tensor(self.model, name, _hollow(self.model, name, dtype, device))
        for name, buffer in list(self.model.named_buffers()):
            if buffer.device.type != "meta":
                _set_tensor(self.model, name, buffer.to(device))
        tie: Any = self.model.tie_weights
        tie()
        self.model.requires_grad_(False)

    def add(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make *part* present from *tensors*, by whole-model name; floats become `self.dtype`.

        A quantised slice asks for one weight at a time and keeps none of them.

        Raises:
            ModelError: a tensor is missing or has another shape than the config says.
        """
        if part.startswith("block."):
            self.blocks[int(part.removeprefix("block."))] = self._with_buffers(part)
        for name in self.layout.part(part):
            if name not in tensors:
                raise ModelError(f"part {part!r} lacks tensor {name!r}")
            self._put(part, name, tensors[name])
            if part.startswith("block.") and not self.is_quantized:
                self._sources[name] = tensors
        tie: Any = self.model.tie_weights
        tie()
        self.present.add(part)

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor of a present block as it lies where `add` took it from, read anew."""
        return self._sources[name][name]

    def block_bytes(self) -> int:
        """Return the bytes of all parameters of present blocks."""
        here = (p for block in self.blocks for p in block.parameters() if not p.is_meta)
        return sum(p.numel() * p.element_size() for p in here)

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Let *value* stand for a tensor of a present block, frozen, on its device."""
        _set_tensor(self.model, name, value.to(self.device, self.dtype))

    def _put(self, part: str, name: str, value: torch.Tensor) -> None:
        """Make one tensor present; no other reference to it remains, unless it is kept."""
        wanted = _get_tensor(self.model, name)
        if value.shape != wanted.shape:
            raise ModelError(
                f"{name}: shape {tuple(value.shape)}, the config says {tuple(wanted.shape)}"
            )
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and take_weight(_owner(self.model, path), value, self.device):
            drop_pages(value)
            return
        stack = find_stack(self.model, name)
        if stack is not None and stack.packed:
            stack.take_over(value, self.device)
            drop_pages(value)
            return
        dtype = self.dtype if value.is_floating_point() else value.dtype
        if name in head_names(self):
            dtype = torch.float32  # trained: 16 bits would swallow its steps
        # A classifier's head is trained in place: never in the caller's tensors. Nor may a bias
        # hold on to the file in which its block's dense weights lie.
        is_own = part == "tail" and self.task != "causal-lm"
        is_own |= part.startswith("block.") and self.is_quantized
        own = value.to(self.device, dtype, copy=is_own)
        _set_tensor(self.model, name, own)
        if own.data_ptr() != value.data_ptr():
            drop_pages(value)

    def _with_buffers(self, part: str) -> nn.Module:
        """Bring the non-persistent buffers of a block back from the meta device."""
        index = int(part.removeprefix("block."))
        block = self.blocks[index]
        path = f"{self.layout.blocks_path}.{index}"
        stored = {name.removeprefix(f"{path}.") for name in self.layout.part(part)}
        if all(name in stored for name, _ in block.named_buffers()):
            return block
        fresh = build_empty(self.model.config, self.task, self.dtype)
        for name, buffer in fresh.get_submodule(path).named_buffers():
            if name not in stored:
                _set_tensor(block, name, buffer.to(self.device))
        return block

    def front(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor, stop: int) -> torch.Tensor:
        """Run embeddings and blocks 0 .. stop-1 on token ids; returns (B, T, D)."""
        with self._ending(stop):
            return self._call(ids_BT, lengths_B)

    def middle(
        self,
        hidden_BTD: torch.Tensor,
        lengths_B: torch.Tensor,
        first: int,
        stop: int,
        ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run blocks first .. stop-1 on a hidden state; returns (B, T, D).

        *ids_BT* is needed where the layout says so.
        """
        ids_BT = self._stand_in_ids(hidden_BTD, lengths_B) if ids_BT is None else ids_BT
        with self._starting(first, hidden_BTD), self._ending(stop):
            return self._call(ids_BT, lengths_B)

    def logits(
        self,
        hidden_BTD: torch.Tensor,
        lengths_B: torch.Tensor,
        first: int,
        pooled_B: torch.Tensor | None = None,
        ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run blocks first .. L-1 and the tail; returns (B, T, V), or (B, V) for a classifier.

        `first` = L runs the tail alone. *pooled_B* says where a decoder's classification head looks
        in each sequence where the ids are not here: at its last token by default. *ids_BT* is
        needed where the layout says so.
        """
        if ids_BT is None:
            ids_BT = self._stand_in_ids(hidden_BTD, lengths_B if pooled_B is None else pooled_B + 1)
        with self._starting(first, hidden_BTD):
            return self._call(ids_BT, lengths_B)

    def whole(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Run the whole model on token ids; returns logits."""
        return self._call(ids_BT, lengths_B)

    # ---- the tail at single positions ----

    @property
    def has_local_tail(self) -> bool:
        """Whether the logits of a position depend on the hidden state there alone.

        Found out once, when the tail is present, by a few states. Where they depend on others, or
        the model's code does not take single positions, the tail runs on all of them; so it does
        where it is trained, as its own gradient is not computed at single positions.
        """
        if any(_get_tensor(self.model, name).requires_grad for name in self._of_tail()):
            return False
        if self._has_local_tail is None:
            reason = "it is a classifier's" if self.task != "causal-lm" else self._try_tail()
            if reason and self.task == "causal-lm":
                log.warning("tail.all_positions reason=%s", reason)
            self._has_local_tail = not reason
        return self._has_local_tail

    def _of_tail(self) -> tuple[str, ...]:
        """Return the names of what the tail computes with, and of the front if it reads that."""
        layout = self.layout
        return (*layout.tail, *(layout.front if layout.tail_needs_front else ()))

    def at_positions(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Run a local tail on the states of single positions; returns (N, V).

        Each is a sequence of its own: no mask between them, and no position beyond the model's.
        """
        ones_N = torch.ones(len(hidden_ND), dtype=torch.int32, device=hidden_ND.device)
        # Not `[:, 0]`, whose gradient would be a copy.
        return self.logits(hidden_ND[:, None], ones_N, len(self.blocks)).flatten(0, 1)

    def before_head(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Run what lies between the last block and the head, as `at_positions` would; (N, D)."""
        assert self.head is not None, "the model has no head of its own"

        def leave(_m: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self.head.register_forward_pre_hook(leave)
        try:
            return self.at_positions(hidden_ND)
        finally:
            handle.remove()

    @property
    def head(self) -> nn.Module | None:
        """The model's output layer, as transformers knows it; None where it knows none."""
        model: Any = self.model
        found: nn.Module | None = model.get_output_embeddings()
        return found

    @property
    def softcap(self) -> float | None:
        """The bound to which the config says that logits are bent."""
        return getattr(self._config, "final_logit_softcapping", None)

    def some_states(self, rows: int, positions: int) -> torch.Tensor:
        """Return random hidden states (B, T, D), always the same ones."""
        shape = (rows, positions, self.layout.width)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Run without gradients, dropout and casts."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.model.train(was_training)

    def _try_tail(self) -> str:
        """Return why the tail has to see all positions; nothing if it has not."""
        lengths_B = torch.tensor(TRIED_LENGTHS, dtype=torch.int32, device=self.device)
        hidden_BTD = self.some_states(len(TRIED_LENGTHS), max(TRIED_LENGTHS))
        where = tuple(torch.tensor(TRIED, device=self.device).t())
        with self.plainly():
            wanted_NV = self.logits(hidden_BTD, lengths_B, len(self.blocks))[where].float()
            try:
                difference_NV = self.at_positions(hidden_BTD[where]).float() - wanted_NV
            except Exception as error:  # somebody else's model code may raise anything
                if is_out_of_memory(error):
                    raise
                return one_line(f"{type(error).__name__}: {error}")
        found = float(difference_NV.norm() / wanted_NV.norm().clamp_min(1e-30))
        bound = LOCAL_BOUND if self.dtype == torch.float32 else LOCAL_HALF_BOUND
        return "" if found <= bound else f"its logits depend on other positions, by {found:.0e}"

    # ---- running the model's code ----

    def _call(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        mask_BT = (positions_T[None, :] < lengths_B[:, None]).long()
        try:
            output = self.model(input_ids=ids_BT, attention_mask=mask_BT)
        except _Reached as reached:
            return reached.hidden_BTD
        logits: torch.Tensor = output.logits
        return logits

    def _stand_in_ids(self, hidden_BTD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return token ids that are the padding token from *lengths_B* on: some heads pool by that.

        The others differ from it, so that a decoder's classification head looks at the last one.
        """
        pad = self.pad_id
        other = pad + 1 if pad + 1 < self._config.vocab_size else 0
        positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        is_real_BT = positions_T[None, :] < lengths_B[:, None].to(hidden_BTD.device)
        return torch.where(is_real_BT, other, pad)

    @contextmanager
    def _starting(self, first: int, hidden_BTD: torch.Tensor) -> Iterator[None]:
        """Hand *hidden_BTD* to block *first*, or to the tail; the blocks before it do nothing.

        They stay in their list, whose length and places some models' code looks at.
        """
        hidden = self.layout.as_blocks_see(hidden_BTD)
        skipped = self.blocks[:first]
        for block in skipped:
            block.forward = self._passing_on
        if first == len(self.blocks):
            handle = self.blocks[-1].register_forward_hook(lambda *_: self._answer(hidden))
        else:
            handle = self.blocks[first].register_forward_pre_hook(
                partial(_replace_hidden, hidden), with_kwargs=True
            )
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.forward

    def _passing_on(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the hidden state that a block was given."""
        return self._answer(hidden_of(args, kwargs))

    def _answer(self, hidden: torch.Tensor) -> Any:
        """Return a hidden state as a block does."""
        rest = (None,) * (self.layout.returned - 1)
        return (hidden, *rest) if self.layout.returned else hidden

    @contextmanager
    def _ending(self, stop: int) -> Iterator[None]:
        """Leave the model's forward with what would enter block *stop*, or the tail."""

        def leave(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(self.layout.as_it_travels(hidden_of(args, kwargs)))

        def leave_last(_m: nn.Module, _args: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            raise _Reached(self.layout.as_it_travels(hidden))

        if stop == len(self.blocks):
            handle = self.blocks[-1].register_forward_hook(leave_last)
        else:
            handle = self.blocks[stop].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _replace_hidden(
    hidden: torch.Tensor, _m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _hollow(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of the right shape that takes the memory of one number."""
    wanted = _get_tensor(model, name)
    kind = dtype if wanted.is_floating_point() else wanted.dtype
    # Made where it is to lie: moved there, it would take the memory of all its numbers.
    return torch.zeros((), dtype=kind, device=device).expand(wanted.shape)


def _owner(model: nn.Module, path: str) -> nn.Module:
    """Return the module at *path*; inside an adapter layer, the base layer with the weight."""
    module = model.get_submodule(path)
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, nn.Module) else module


def _get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(_owner(model, path), leaf)
    return tensor


def _set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = _owner(model, path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def head_names(slice_: Slice) -> tuple[str, ...]:
    """Return the parameters of a classifier's head, trained in full; none for a causal LM."""
    if slice_.task == "causal-lm":
        return ()
    base = f"{getattr(slice_.model, 'base_model_prefix', '')}."
    return tuple(name for name in slice_.layout.tail if not name.startswith(base))


def named_parameters(slice_: Slice, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of a slice by whole-model name."""
    return {name: slice_.model.get_parameter(name) for name in names}
