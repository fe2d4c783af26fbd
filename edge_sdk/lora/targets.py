"""Which weights get an adapter, and what planning needs to know of them.

Importing this loads no torch; what looks into a model imports it where it is used.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from edge_sdk.model.layout import Layout, Task

log = logging.getLogger(__name__)

# PEFT's name for an adapter where there is only one.
OWN = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which weights get an adapter, and of what kind; names and meaning as in PEFT."""

    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of modules, or of parameters that hold experts, full or their last parts; `all-linear`
    is every linear layer of the blocks, with their experts."""
    r: int = 8
    """Rank where a device's own settings name none."""
    lora_alpha: float = 16.0
    """The adapter's scale is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single weights, by the end of their module name; regular expressions, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for lora_alpha."""
    use_rslora: bool = False
    """Whether to scale by the square root of the rank (rsLoRA)."""
    lora_dropout: float = 0.0
    """Dropout before the adapter, while training."""
    experts: bool = field(default=True, metadata={"on_wire": False})
    """Whether `all-linear` includes experts that a model stacks in one parameter (PEFT's
    `target_parameters`); they can also be named one by one in target_modules."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if not self.target_modules:
            raise ValueError("target_modules is empty; name modules or use 'all-linear'")

    def rank_of(self, weight: str, default: int) -> int:
        """Return the rank of *weight*: that of the first pattern that fits, or *default*."""
        return _first_fit(self.rank_pattern, weight, default)

    def alpha_of(self, weight: str) -> float:
        """Return the alpha of *weight*."""
        return _first_fit(self.alpha_pattern, weight, self.lora_alpha)

    def scale(self, weight: str, rank: int) -> float:
        """Return the factor in front of the B A of *weight*."""
        alpha = self.alpha_of(weight)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


T = TypeVar("T")


def _first_fit(patterns: Mapping[str, T], weight: str, default: T) -> T:
    if not patterns:
        return default
    fits = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", weight))
    return next(fits, default)


class Shape(tuple[int, ...]):
    """Size of a weight as an array: (O, I), or (E, O, I) of a stack of experts."""

    __slots__ = ()

    def __new__(cls, *sizes: int) -> Shape:
        """Take the sizes one by one."""
        return super().__new__(cls, sizes)

    def __getnewargs__(self) -> tuple[int, ...]:
        """Let copies be made of the sizes, one by one."""
        return tuple(self)

    @property
    def num_outputs(self) -> int:
        """Rows of a matrix."""
        return self[-2]

    @property
    def num_inputs(self) -> int:
        """Columns of a matrix."""
        return self[-1]

    @property
    def num_experts(self) -> int:
        """Matrices of the stack; 0 for a linear layer."""
        return self[0] if len(self) == 3 else 0

    @property
    def most_rank(self) -> int:
        """Largest rank that a matrix can have."""
        return min(self.num_outputs, self.num_inputs)

    @property
    def num_weights(self) -> int:
        """Entries of all matrices."""
        return math.prod(self)

    def factors(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B: (R, I) and (O, R), of experts (E, R, I) and (E, O, R)."""
        stack = self[:-2]
        return (*stack, rank, self.num_inputs), (*stack, self.num_outputs, rank)


def find_targets(config: Any, task: Task, layout: Layout, lora: LoraConfig) -> dict[str, Shape]:
    """Return the weights of all blocks that *lora* adapts, by module name, in model order.

    Raises:
        ConfigError: nothing matches, or the rank exceeds a weight.
    """
    import torch

    from edge_sdk.model.layout import build_empty

    model = build_empty(config, task, torch.float32)
    shapes = _adaptable(model, layout.blocks_path)
    names = lora.target_modules
    found = {
        name: shape
        for name, shape in shapes.items()
        if any(_ends(name, n) for n in names)
        or ("all-linear" in names and (lora.experts or not shape.num_experts))
    }
    if forbidden := _forbidden(model, [name for name, s in found.items() if not s.num_experts]):
        _say_left_out(forbidden, names, config.model_type)
        found = {n: s for n, s in found.items() if n.rpartition(".")[2] not in forbidden}
    unused = [n for n in names if n != "all-linear" and not any(_ends(f, n) for f in found)]
    if not found or unused:
        leaves = sorted({n.rsplit(".", 1)[1] for n in shapes})
        raise ConfigError(
            f"lora.target_modules: {', '.join(unused or names)!r} matches no weight in the blocks; "
            f"they have {', '.join(leaves)}"
        )
    stacked = [name for name, shape in found.items() if shape.num_experts]
    if stacked and lora.lora_dropout:
        raise ConfigError(
            f"lora.lora_dropout: {lora.lora_dropout} is not possible with adapters on experts "
            f"({stacked[0]}, ...), as in PEFT; set it to 0, or lora.experts to false"
        )
    return found


def _adaptable(model: nn.Module, blocks_path: str) -> dict[str, Shape]:
    """Return all weights of the blocks that can have an adapter, in model order."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from edge_sdk.model.experts import expert_sizes, expert_weights

    stacks = expert_weights(model)
    found = {}
    for path, module in model.named_modules():
        if not path.startswith(f"{blocks_path}."):
            continue
        shape = _shape(module) if isinstance(module, nn.Linear | Conv1D) else None
        if shape and not _is_product(module, shape):
            shape = None
        if shape:
            found[path] = shape
        for leaf in module._parameters:
            if f"{path}.{leaf}" in stacks:
                found[f"{path}.{leaf}"] = Shape(*expert_sizes(module, leaf))
    return found


def _is_product(module: nn.Module, shape: Shape) -> bool:
    """Return whether a layer answers a product and nothing else.

    What is derived from a linear layer may answer more: a router, for one.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    try:
        found = module(torch.empty(2, shape.num_inputs, device="meta"))
    except Exception:  # noqa: BLE001 - somebody else's layer may want anything
        return False
    return isinstance(found, torch.Tensor) and found.shape == (2, shape.num_outputs)


def _say_left_out(forbidden: Sequence[str], names: Iterable[str], kind: str) -> None:
    """Say which modules get no adapter; refuse them where they were asked for by name."""
    if named := [name for name in names if name.rpartition(".")[2] in forbidden]:
        raise ConfigError(
            f"lora.target_modules: PEFT puts no adapter on {', '.join(named)!r} in a model of type "
            f"{kind!r}; leave it out"
        )
    what = ",".join(forbidden)
    log.warning("adapters.left_out modules=%s reason=%s", what, "PEFT forbids them here")


def _forbidden(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the last parts of *names* that PEFT refuses to adapt in such a model."""
    from peft.tuners.lora import LoraModel

    one_each = {name.rpartition(".")[2]: name for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses experts, for which it was not asked
            LoraModel(model, {OWN: peft_config(list(one_each.values()), model, r=1)}, OWN)
    except ValueError as error:
        return sorted(leaf for leaf in one_each if f"'{leaf}'" in str(error))
    return []


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _shape(module: nn.Module) -> Shape | None:
    """Return (O, I) of a linear layer, whatever its class calls them."""
    from edge_sdk.model.layout import is_transposed

    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2 or type(module).__name__ == "Embedding":
        return None
    rows, columns = (int(n) for n in weight.shape)
    return Shape(columns, rows) if is_transposed(module) else Shape(rows, columns)


def peft_config(targets: str | list[str], model: nn.Module, **settings: Any) -> Any:
    """Return PEFT's own configuration of adapters on *targets*."""
    import peft

    from edge_sdk.model.layout import is_transposed

    transposed = any(is_transposed(m) for m in model.modules())
    return peft.LoraConfig(target_modules=targets, fan_in_fan_out=transposed, **settings)


def check_rank(name: str, rank: int, shape: Shape, key: str = "r") -> None:
    """Refuse a rank that the weight cannot have; *key* is what gave it."""
    if not 0 <= rank <= shape.most_rank:
        raise ConfigError(
            f"{key}: rank {rank} for {name!r} is outside 0..{shape.most_rank} "
            f"(the weight is {shape.num_outputs} x {shape.num_inputs})"
        )


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of the model."""

    layout: Layout
    targets: Mapping[str, Shape]
    """Adapted weights of all blocks, in model order."""

    def block_of(self, weight: str) -> int:
        """Return the block that a weight belongs to."""
        return int(weight.removeprefix(f"{self.layout.blocks_path}.").split(".", 1)[0])

    def weights(self, first: int, stop: int) -> list[str]:
        """Return the adapted weights of blocks first .. stop-1."""
        return [name for name in self.targets if first <= self.block_of(name) < stop]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the blocks has adapters."""

    num_adapted: int
    """Weight matrices with an adapter; a stack of experts counts as one."""
    num_weights: int
    """Weight matrices of all blocks."""
    share: float
    """Numbers in the adapted ones, as a share of those in all of them."""
    bare_blocks: tuple[int, ...]
    """Blocks without any adapter."""
    bare_weights: tuple[str, ...] = ()
    """What the matrices without an adapter are called in their blocks, numbers left out."""

    @property
    def text(self) -> str:
        """One line for a person."""
        return (
            f"adapters on {self.num_adapted} of {self.num_weights} block weights "
            f"({self.share:.0%}); blocks without any: {stretches(self.bare_blocks) or 'none'}"
        )


def coverage(config: Any, task: Task, layout: Layout, targets: Collection[str]) -> Coverage:
    """Return how much of the blocks of a model *targets* are; no weights are read."""
    import torch

    from edge_sdk.model.layout import build_empty

    facts = ModelFacts(layout, {})
    model = build_empty(config, task, torch.float32)
    inside = {name for block in layout.blocks for name in block}
    sizes = {
        name.removesuffix(".weight"): weight.numel()
        for name, weight in model.named_parameters()
        if name in inside and weight.dim() > 1 and not name.endswith("bias")
    }
    adapted = {name.removesuffix(".weight") for name in targets}
    covered = sum(size for name, size in sizes.items() if name in adapted)
    bare = set(range(layout.num_blocks)) - {facts.block_of(name) for name in targets}
    share = covered / max(1, sum(sizes.values()))
    plain = re.compile(rf"{re.escape(layout.blocks_path)}\.\d+\.|(?<=\.)\d+\.")
    bare_weights = tuple(sorted({plain.sub("", name) for name in sizes.keys() - adapted}))
    return Coverage(len(adapted), len(sizes), share, tuple(sorted(bare)), bare_weights)


def stretches(numbers: Iterable[int]) -> str:
    """Return ascending numbers in words, such as `1, 4-8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
