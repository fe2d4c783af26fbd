"""Read the sizes that estimates need off a model without weights; docs/method.md, Memory.

Knows no model family: what a block keeps for its backward pass is observed by running one block on
a few tokens, in the model's own code. Knows no plan and no device.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edge_sdk.model.experts import expert_sizes, expert_weights
from edge_sdk.model.layout import Layout, Task, is_transposed
from edge_sdk.model.partition import CPU, Slice, head_names
from edge_sdk.model.precision import autocast
from profiler.estimate.sizes import Kept, Linear, ModelShape

# Frozen parameters and computation: the widths that a device may run.
_WIDTHS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)
# One of two rows is padded, as in most batches: only then does a model make a mask.
_ROWS = 2
# Three lengths tell apart what grows with T^2, with T and not at all.
_LENGTHS = (8, 16, 24)


def model_shape(config: Any, task: Task, layout: Layout) -> ModelShape:
    """Return the sizes of the model of *config*; its largest block stands for all of them.

    Args:
        config: The model's configuration, as transformers reads it.
        task: What the model is used for.
        layout: Where its parts are.
    """
    slices = [Slice(config, task, layout, base) for base, _ in _WIDTHS]
    model: Any = slices[0].model
    text = model.config.get_text_config()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = [_total(sizes, names) for names in layout.blocks]
    # A block that reads what an earlier one has kept cannot run alone.
    alone = set(range(layout.num_blocks)) - {reader for _, reader in layout.shared}
    block = max(sorted(alone), key=blocks.__getitem__)
    for slice_ in slices:
        _add_zeros(slice_, block)
    linears = _linears(slices[0], block) + _experts(slices[0], block)
    return ModelShape(
        num_blocks=layout.num_blocks,
        hidden_size=layout.width,
        intermediate_size=max(linear.num_inputs for linear in linears),
        num_heads=getattr(text, "num_attention_heads", None) or 1,
        head_dim=getattr(text, "head_dim", None) or 0,
        vocab_size=text.vocab_size,
        linears=linears,
        block_params=max(blocks),
        front_params=_total(sizes, layout.front),
        late_params=_total(sizes, layout.late),
        tail_params=_total(sizes, layout.tail),
        tail_needs_front=layout.tail_needs_front,
        num_labels=0 if task == "causal-lm" else int(text.num_labels),
        blocks_path=layout.blocks_path,
        head_params=_total(sizes, head_names(slices[0])),
        kept=tuple(
            _kept(slice_, block, *widths) for slice_, widths in zip(slices, _WIDTHS, strict=True)
        ),
    )


def _total(sizes: dict[str, int], names: Iterable[str]) -> int:
    """Count the parameters among the named tensors; buffers count for nothing."""
    return sum(sizes.get(name, 0) for name in names)


def _experts(slice_: Slice, block: int) -> tuple[Linear, ...]:
    """Return the experts of a block, all of whose matrices lie in one parameter.

    A token passes through as many as the config says; through all where it says nothing.
    """
    prefix = f"{slice_.layout.blocks_path}.{block}."
    config: Any = slice_.model.config
    per_token = getattr(config.get_text_config(), "num_experts_per_tok", None)
    found = []
    for name in expert_weights(slice_.model):
        if name.startswith(prefix):
            path, _, leaf = name.rpartition(".")
            count, outputs, inputs = expert_sizes(slice_.model.get_submodule(path), leaf)
            inside = name.removeprefix(prefix)
            active = per_token or count
            found.append(Linear(inside, outputs, inputs, num_experts=count, num_active=active))
    return tuple(found)


def _add_zeros(slice_: Slice, block: int) -> None:
    """Make *block* present with weights of zero, which no page of memory stands behind."""
    prefix = f"{slice_.layout.blocks_path}.{block}."
    tensors = {prefix + n: t for n, t in slice_.blocks[block].state_dict().items()}
    # numpy asks the kernel for zeros, which nobody writes; torch would write its own.
    zeros = torch.from_numpy(np.zeros(max(t.nbytes for t in tensors.values()), np.uint8))
    hollow = {n: zeros[: t.nbytes].view(t.dtype).view(t.shape) for n, t in tensors.items()}
    slice_.add(f"block.{block}", hollow)
    slice_.model.train()  # dropout keeps its noise


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what a block makes and keeps as it runs forward; tensors are told apart by memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, int] = {}
        """Bytes of whatever the block made, by its place."""
        self.saved: dict[int, int] = {}
        """Bytes of whatever the backward pass needs, by its place."""
        self.inputs: dict[str, int] = {}
        """Place of each linear layer's input, by its name, in the order of the calls."""
        self.shared: set[int] = set()
        """Places that are not this block's own."""
        self._alive: list[torch.Tensor] = []
        self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result) if self._is_inside else ():
            if isinstance(tensor, torch.Tensor):
                self.made[self._place(tensor)] = tensor.untyped_storage().nbytes()
        return result

    def _place(self, tensor: torch.Tensor) -> int:
        self._alive.append(tensor.detach())  # so that nothing else comes to lie there
        return tensor.untyped_storage().data_ptr()

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note what autograd packs."""
        self.saved[self._place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that its own operation holds would never be freed

    def enter_linear(self, name: str, _m: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Note the input of a linear layer."""
        self.inputs[name] = self._place(args[0])

    def enter_block(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Note weights, and masks and rotary tables: those are made once, for all blocks."""
        tensors = [*module.parameters(), *module.buffers(), *tree_leaves((args, kwargs))]
        self.shared |= {self._place(t) for t in tensors if isinstance(t, torch.Tensor)}
        self._is_inside = True

    def leave_block(self, *_: object) -> None:
        """Count whatever is made from here on as not the block's."""
        self._is_inside = False

    def kept(self) -> dict[int, int]:
        """Return what the block itself keeps, by its place."""
        return {place: size for place, size in self.saved.items() if place not in self.shared}

    def num_bytes(self) -> tuple[int, int]:
        """Return how much the block keeps, and how much it made and does not keep."""
        kept = self.kept()
        stays = kept.keys() | self.shared
        freed = (size for place, size in self.made.items() if place not in stays)
        return sum(kept.values()), sum(freed)


def _watch(slice_: Slice, block: int, length: int, compute: torch.dtype) -> _Watch:
    """Run *block* forward on *length* tokens, without adapters but with a gradient to pass on."""
    module, watch = slice_.blocks[block], _Watch()
    size = (_ROWS, length, slice_.layout.width)
    hidden_BTD = torch.zeros(size, dtype=slice_.dtype, requires_grad=True)
    lengths_B = torch.tensor([length] + [length - 1] * (_ROWS - 1))
    handles = [
        module.register_forward_pre_hook(watch.enter_block, with_kwargs=True),
        module.register_forward_hook(watch.leave_block),
    ]
    for name, linear in _linear_layers(module).items():
        handles.append(linear.register_forward_pre_hook(partial(watch.enter_linear, name)))
    with (
        torch.random.fork_rng(devices=[]),  # dropout draws
        torch.autograd.graph.saved_tensors_hooks(watch.save, lambda tensor: tensor),
        autocast(compute, CPU),
        watch,
    ):
        slice_.middle(hidden_BTD, lengths_B, block, block + 1)
    for handle in handles:
        handle.remove()
    return watch


def _linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Return every module of *block* that multiplies by a matrix of its own."""
    owners = {n: m for n, m in block.named_modules() if "weight" in m._parameters}
    return {n: m for n, m in owners.items() if m.get_parameter("weight").dim() == 2}


def _linears(slice_: Slice, block: int) -> tuple[Linear, ...]:
    """Return a block's linear layers as they run, and which of their inputs are there anyway."""
    watch = _watch(slice_, block, _LENGTHS[0], torch.float32)
    layers, kept = _linear_layers(slice_.blocks[block]), watch.kept()
    readers = Counter(watch.inputs.values())
    places = list(readers)
    found = []
    for name, place in watch.inputs.items():
        rows, columns = layers[name].get_parameter("weight").shape
        outputs, inputs = (columns, rows) if is_transposed(layers[name]) else (rows, columns)
        found.append(
            Linear(name, outputs, inputs, places.index(place), readers[place], place in kept)
        )
    return tuple(found)


def _kept(slice_: Slice, block: int, base: torch.dtype, compute: torch.dtype) -> Kept:
    """Return what a block keeps and frees, by the growth from one length to the next."""
    seen = [_watch(slice_, block, length, compute).num_bytes() for length in _LENGTHS]
    per_block, per_token, per_pair = _fit([kept for kept, _ in seen])
    _, freed_per_token, freed_per_pair = _fit([freed for _, freed in seen])
    return Kept(
        base_bytes=base.itemsize,
        compute_bytes=compute.itemsize,
        per_block=per_block,
        per_token=per_token,
        per_pair=per_pair,
        freed_per_token=freed_per_token,
        freed_per_pair=freed_per_pair,
    )


def _fit(sizes: Sequence[int]) -> tuple[float, float, float]:
    """Return bytes whatever the length, for each token and for each pair, from `_LENGTHS`."""
    first, step = _LENGTHS[0], _LENGTHS[1] - _LENGTHS[0]
    square = (sizes[2] - 2 * sizes[1] + sizes[0]) / (2 * step**2)
    line = (sizes[1] - sizes[0]) / step - square * (2 * first + step)
    constant = sizes[0] - line * first - square * first**2
    return max(0.0, constant), max(0.0, line / _ROWS), max(0.0, square / _ROWS)
