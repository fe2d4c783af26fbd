"""Find out which of a model's tensors belong before, in and after its blocks.

Knows no model family: the block list is the `ModuleList` of length `config.num_hidden_layers`, and
what runs before and after it, and what else reaches later blocks, is observed once, without weights
(docs/method.md, Partition). Knows no files and no network.
"""

from __future__ import annotations

import copy
import json
import math
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edge_sdk.errors import ModelError, is_out_of_memory, one_line
from edge_sdk.model.weightless import POSITIONS, ROWS, first_names, own_tensors, watch

Task = Literal["causal-lm", "sequence-classification"]

# Configurations whose layout is kept; a process that compares methods sees a few.
MOST_KNOWN = 16


@dataclass(frozen=True)
class Layout:
    """Which of a model's tensors belong to which part of it; names are the whole model's."""

    blocks_path: str
    """Module path of the block list."""
    num_blocks: int
    front: tuple[str, ...]
    """Parameters and buffers used before the first block: embeddings."""
    blocks: tuple[tuple[str, ...], ...]
    """The same for each block."""
    tail: tuple[str, ...]
    """The same after the last block: final norm, head. Tied weights stand in `front` only."""
    tail_needs_front: bool
    """Whether the tail uses a tensor of the front: a head tied to the embeddings."""
    returned: int
    """Values of the tuple that a block returns, the hidden state first; 0 where it is no tuple."""
    hidden_axes: tuple[str | int, ...] = ("B", "T", 0)
    """Axes of the hidden state as blocks see it: B, T, and the sizes of the others."""
    late: tuple[str, ...] = ()
    """Tensors of the front that blocks after the first need, beside the hidden state."""
    needs_ids: bool = False
    """Whether blocks after the first need the token ids, beside the hidden state."""
    shared: tuple[tuple[int, int], ...] = ()
    """Pairs of blocks of which the second reads what the first has kept."""

    def part(self, name: str) -> tuple[str, ...]:
        """Return the tensor names of part *name*: `front`, `late`, `block.<i>` or `tail`."""
        outside = {"front": self.front, "late": self.late, "tail": self.tail}
        if name in outside:
            return outside[name]
        return self.blocks[int(name.removeprefix("block."))]

    def block_of(self, name: str) -> int | None:
        """Return the block that a tensor or a module belongs to; None outside the blocks."""
        prefix = f"{self.blocks_path}."
        if not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).split(".", 1)[0])

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts, in model order; `late` is a part of the front."""
        return ("front", *(f"block.{i}" for i in range(self.num_blocks)), "tail")

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Numbers of blocks, 1 .. L, that a device can hold: no cut parts blocks that share."""
        every = range(1, self.num_blocks + 1)
        return tuple(k for k in every if not any(i < k <= j for i, j in self.shared))

    def cut_below(self, split: int) -> int:
        """Return the next smaller number of blocks that a device can hold; 0 where none is."""
        return max((k for k in self.cuts if k < split), default=0)

    def why_not(self, split: int) -> str:
        """Say why no device can hold just the first *split* blocks."""
        readers: dict[int, list[int]] = {}
        for source, reader in self.shared:
            if source < split <= reader:
                readers.setdefault(source, []).append(reader)
        told = [
            f"block{_listed(own)} what block {source} has kept" for source, own in readers.items()
        ]
        near = [k for k in (self.cut_below(split), *self.cuts) if k and not k < split][:1]
        below = self.cut_below(split)
        where = f"{below} or less, or {near[0]} or more" if below else f"{near[0]} or more"
        return f"{' and '.join(told)}; the split can be {where}"

    @property
    def width(self) -> int:
        """D, the numbers that travel for each token."""
        return math.prod(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [axis for axis in self.hidden_axes if isinstance(axis, int)]

    @property
    def _order(self) -> list[int]:
        """Return where the axes B, T and the others stand."""
        axes = list(self.hidden_axes)
        rest = [i for i, axis in enumerate(axes) if isinstance(axis, int)]
        return [axes.index("B"), axes.index("T"), *rest]

    def as_it_travels(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a block's hidden state as (B, T, D)."""
        if self._order == [0, 1, 2]:
            return hidden
        return hidden.permute(self._order).flatten(2)

    def as_blocks_see(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Undo `as_it_travels`."""
        order = self._order
        if order == [0, 1, 2]:
            return hidden_BTD
        apart = hidden_BTD.reshape(*hidden_BTD.shape[:2], *self._sizes)
        return apart.permute([order.index(i) for i in range(len(order))])


def _listed(blocks: list[int]) -> str:
    """Return ` 4 reads`, or `s 4 to 6 read`."""
    if len(blocks) == 1:
        return f" {blocks[0]} reads"
    is_run = blocks == list(range(blocks[0], blocks[-1] + 1)) and len(blocks) > 2
    names = f"{blocks[0]} to {blocks[-1]}" if is_run else " and ".join(map(str, blocks))
    return f"s {names} read"


def build_empty(config: Any, task: Task, dtype: torch.dtype) -> nn.Module:
    """Build the model of *config* with every parameter on the meta device, buffers in place."""
    with building, _EmptyOnMeta():
        model = _from_config(config, task, dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # also those that were not made by `torch.empty`
                module._parameters[name] = _on_meta(parameter)
    tie: Any = model.tie_weights  # what was one parameter are several now
    tie()
    return model


# While transformers builds a model it sets things that all threads see.
building = threading.RLock()
_known: dict[tuple[type, str, Task], Layout] = {}


# Some experts begin as zeros, of more memory than there is; no buffer is that large.
_FILLED = (torch.zeros, torch.ones, torch.rand, torch.randn)
MOST_FILLED = 1 << 24
# What gives a tensor its initial values, in torch and in torch.nn.init.
_FILLING = ("normal_", "uniform_", "zeros_", "ones_", "zero_", "fill_", "erfinv_", "mul_", "add_")


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what this thread makes without initial values on the meta device.

    Modules make their parameters by `torch.empty` and their buffers by other means. Unlike
    `accelerate.init_empty_weights` this changes nothing that another thread could see.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        on_meta = {**given, "device": "meta"}
        if func is torch.empty:
            return func(*args, **on_meta)
        if func in _FILLED and func(*args, **on_meta).numel() >= MOST_FILLED:
            return func(*args, **on_meta)
        filled = args[0] if args else given.get("tensor")
        if func.__name__ in _FILLING and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled  # initial values are made for each weight, at length, and seen by nobody
        return func(*args, **given)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)


def auto_class(config: Any, task: Task) -> Any:
    """Return the auto class of transformers that makes a model of *config* for *task*.

    Some models of images and text have no other class that speaks.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if task == "sequence-classification":
        return AutoModelForSequenceClassification
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _from_config(config: Any, task: Task, dtype: torch.dtype) -> nn.Module:
    factory = auto_class(config, task)
    config = without_cache(copy.deepcopy(config))
    try:
        model: nn.Module = factory.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - somebody else's model code may raise anything
        if is_out_of_memory(error):
            raise
        kind = getattr(config, "model_type", type(config).__name__)
        reason = one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise ModelError(
            f"transformers builds no {task} model of type {kind!r}: {reason}"
        ) from None
    return model


def without_cache(config: Any) -> Any:
    """Turn the cache of past tokens off in *config* and in every config inside it; returns it."""
    from transformers import PretrainedConfig

    config.use_cache = False
    for inner in vars(config).values():
        if isinstance(inner, PretrainedConfig):
            without_cache(inner)
    return config


def find_blocks(model: nn.Module) -> str:
    """Return the module path of the block list of *model*.

    Raises:
        ModelError: no `ModuleList` has `config.num_hidden_layers` entries.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    wanted = getattr(text_config, "num_hidden_layers", None)
    if wanted is None:
        raise ModelError(f"{type(model).__name__}: its config has no num_hidden_layers")
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, module in lists.items() if len(module) == wanted]
    # Other towers of the model may be as deep.
    speaks = type(text_config)
    fitting = [n for n in fitting if isinstance(_config_of(model, n), speaks)] or fitting
    if not fitting:
        seen = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: no list of {wanted} blocks (config.num_hidden_layers) found; "
            f"module lists seen: {seen}"
        )
    # Two lists of that length: the blocks are where the weights are.
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in fitting}
    return str(max(fitting, key=sizes.__getitem__))


def _config_of(model: nn.Module, path: str) -> Any:
    """Return the config of the innermost module around *path* that has one."""
    while path:
        path = path.rpartition(".")[0]
        if (config := getattr(model.get_submodule(path), "config", None)) is not None:
            return config
    return None


def find_layout(config: Any, task: Task) -> Layout:
    """Watch a weightless model of *config* run and return what belongs where.

    Raises:
        ModelError: it has no list of blocks, or none that can be cut; the message says why.
    """
    try:
        # Some grouped kernels have no other shape rule.
        return _layout_of(build_empty(config, task, torch.bfloat16).eval())
    except ModelError:
        # Some code makes float32 tensors, whatever its weights are.
        return _layout_of(build_empty(config, task, torch.float32).eval())


def known_layout(config: Any, task: Task) -> Layout:
    """Return what `find_layout` does, found once for each configuration in this process.

    Every new plan and every simulated device would watch the same model again. Call it within
    `building`.

    Raises:
        ModelError: as `find_layout`.
    """
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = (type(config), text, task)
    if key not in _known:
        layout = find_layout(config, task)
        while len(_known) >= MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = layout
    return _known[key]


def _layout_of(model: nn.Module) -> Layout:
    kind = type(model).__name__
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}: an encoder with a decoder cannot be cut between its blocks")
    blocks_path = find_blocks(model)
    names = first_names(model)
    blocks = tuple(
        tuple(names[id(t)] for m in block.modules() for t in own_tensors(m).values())
        for block in model.get_submodule(blocks_path).children()
    )
    seen = watch(model, blocks_path)
    owner = {name: i for i, own in enumerate(blocks) for name in own}
    if read := sorted({owner[name] for name in seen.tail_needs if name in owner}):
        raise ModelError(f"{kind}: its head reads block {read[0]} by another way than the last one")
    late = {name for needs in seen.needs[1:] for name in needs if name not in owner}
    return Layout(
        blocks_path=blocks_path,
        num_blocks=len(blocks),
        front=seen.front,
        blocks=blocks,
        tail=tuple(name for name in seen.tail if name not in seen.front),
        tail_needs_front=any(name in seen.front for name in seen.tail),
        returned=seen.returned,
        hidden_axes=_axes(kind, seen.hidden_shape),
        late=tuple(name for name in seen.front if name in late),
        needs_ids=seen.ids_matter,
        shared=tuple(
            (by, block)
            for block, needs in enumerate(seen.needs)
            for by in sorted({owner[name] for name in needs if name in owner})
        ),
    )


def _axes(kind: str, shape: tuple[int, ...]) -> tuple[str | int, ...]:
    names = {ROWS: "B", POSITIONS: "T"}
    if any(shape.count(size) != 1 for size in names) or len(shape) < 3:
        raise ModelError(f"{kind}: its blocks pass on no state for each token, but {list(shape)}")
    return tuple(names.get(size, size) for size in shape)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the layer keeps its weight as (I, O)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def usable_positions(model_config: Any, task: Task) -> int:
    """Return the tokens of the longest sequence the model can take.

    A position table with a padding row starts counting behind it, so that fewer are usable.
    """
    text_config = model_config.get_text_config()
    positions = int(getattr(text_config, "max_position_embeddings", 0) or 1 << 20)
    model = build_empty(model_config, task, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions:
            return positions - (0 if module.padding_idx is None else module.padding_idx + 1)
    return positions
