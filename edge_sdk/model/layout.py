"""Find out which of a model's tensors belong before, in and after its blocks.

Knows no model family: the block list is the `ModuleList` of length `config.num_hidden_layers`, and
what runs before and after it is observed once, without weights (docs/method.md, Partition). Knows
no files and no network.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from edge_sdk.errors import ModelError

if TYPE_CHECKING:
    pass

Task = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True, slots=True)
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
    returns_tuple: bool
    """Whether a block returns (hidden, ...) rather than hidden."""

    def part(self, name: str) -> tuple[str, ...]:
        """Return the tensor names of part *name*: `front`, `block.<i>` or `tail`."""
        if name == "front":
            return self.front
        return self.tail if name == "tail" else self.blocks[int(name.removeprefix("block."))]

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts, in model order."""
        return ("front", *(f"block.{i}" for i in range(self.num_blocks)), "tail")


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


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what this thread makes without initial values on the meta device.

    Modules make their parameters by `torch.empty` and their buffers by other means. Unlike
    `accelerate.init_empty_weights` this changes nothing that another thread could see.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}
        return func(*args, **given)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)


def _from_config(config: Any, task: Task, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factory: Any = AutoModelForCausalLM
    if task == "sequence-classification":
        factory = AutoModelForSequenceClassification
    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        model: nn.Module = factory.from_config(config, dtype=dtype)
    except (ValueError, AttributeError, KeyError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"transformers builds no {task} model of type {kind!r}: {reason}"
        ) from None
    return model


def find_blocks(model: nn.Module) -> str:
    """Return the module path of the block list of *model*.

    Raises:
        ModelError: no `ModuleList` has `config.num_hidden_layers` entries.
    """
    config: Any = model.config
    wanted = config.get_text_config().num_hidden_layers
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, module in lists.items() if len(module) == wanted]
    if not fitting:
        seen = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: no list of {wanted} blocks (config.num_hidden_layers) found; "
            f"module lists seen: {seen}"
        )
    # Two lists of that length: the blocks are where the weights are.
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in fitting}
    return str(max(fitting, key=sizes.__getitem__))


def find_layout(config: Any, task: Task) -> Layout:
    """Watch a weightless model of *config* run once and return what belongs where."""
    # bfloat16: some grouped kernels have no other shape rule.
    model = build_empty(config, task, torch.bfloat16).eval()
    blocks_path = find_blocks(model)
    blocks: Any = model.get_submodule(blocks_path)
    name_of = {id(t): name for name, t in reversed(list(model.state_dict(keep_vars=True).items()))}
    used: dict[str, dict[str, None]] = {"front": {}, "tail": {}}
    outputs: list[Any] = []

    def note(module: nn.Module, *_: object) -> None:
        phase = used["tail" if outputs else "front"]
        phase.update((name_of[id(tensor)], None) for tensor in _own_tensors(module))

    inside = {id(m) for m in blocks.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module.register_forward_pre_hook(note)
    blocks[-1].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    _run_weightless(model, blocks_path)
    if not outputs:
        raise ModelError(f"{type(model).__name__}: its blocks at {blocks_path!r} are never called")
    return Layout(
        blocks_path=blocks_path,
        num_blocks=len(blocks),
        front=tuple(used["front"]),
        blocks=tuple(
            tuple(name_of[id(t)] for m in block.modules() for t in _own_tensors(m))
            for block in blocks
        ),
        tail=tuple(name for name in used["tail"] if name not in used["front"]),
        tail_needs_front=any(name in used["front"] for name in used["tail"]),
        returns_tuple=isinstance(outputs[0], tuple),
    )


def _run_weightless(model: nn.Module, blocks_path: str) -> None:
    """Call *model* on two tokens; whatever owns parameters is computed on the meta device.

    The code in between (masks, positions) runs for real, because it looks at values.
    """
    on_meta: list[str] = []
    for name, module in model.named_modules():
        is_block = name.startswith(f"{blocks_path}.")
        if (is_block or _own_tensors(module)) and not any(name.startswith(m) for m in on_meta):
            on_meta.append(f"{name}.")
            module.to("meta")
            module.forward = partial(_shape_only, module.forward)
    ids_BT = torch.ones(1, 2, dtype=torch.long)
    try:
        with torch.no_grad():
            model(input_ids=ids_BT, attention_mask=ids_BT)
    except Exception as error:  # noqa: BLE001 - somebody else's model code may raise anything
        raise ModelError(f"{type(model).__name__} cannot be traced: {error}") from error


def _shape_only(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run *forward* on the meta device and answer zeros of the shape that comes out."""
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    return tree_map_only(
        torch.Tensor,
        lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape),
        forward(*args, **kwargs),
    )


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return parameters and persistent buffers that sit directly on *module*."""
    buffers = {
        n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set
    }
    own = [*module._parameters.values(), *buffers.values()]
    return [tensor for tensor in own if tensor is not None]


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
