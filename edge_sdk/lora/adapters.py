"""PEFT's LoRA layers on the present blocks of a slice: factors in and out, residual, head.

Each adapted weight computes `W x + U V x + s B A x`: W frozen, U V the frozen residual of design.md
6, s B A the trained adapter. Knows no optimizer, no network and no aggregation rule.

Legend: R rank, I inputs, O outputs, S rank of the residual.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.lora.factors import Array, Factors, zero

if TYPE_CHECKING:
    from torch import nn

    from edge_sdk.model.layout import Layout, Task
    from edge_sdk.model.partition import Slice

OWN = "default"
RESIDUAL = "residual"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which weights get an adapter, and of what kind; names and meaning as in PEFT."""

    target_modules: tuple[str, ...] = ("all-linear",)
    """Module names, full or their last parts; `all-linear` is every linear layer of the blocks."""
    r: int = 8
    """Rank where a device's own settings name none."""
    lora_alpha: float = 16.0
    """The adapter's scale is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single weights, by the end of their module name; regular expressions, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for lora_alpha."""
    use_rslora: bool = False
    """Scale by the square root of the rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapter, while training."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if not self.target_modules:
            raise ValueError("target_modules is empty; name modules or use 'all-linear'")

    def rank_of(self, weight: str, default: int) -> int:
        """The rank of *weight*: that of the first pattern that fits, or *default*."""
        return _first_fit(self.rank_pattern, weight, default)

    def alpha_of(self, weight: str) -> float:
        """The alpha of *weight*."""
        return _first_fit(self.alpha_pattern, weight, self.lora_alpha)

    def scale(self, weight: str, rank: int) -> float:
        """The factor in front of the B A of *weight*."""
        alpha = self.alpha_of(weight)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


T = TypeVar("T")


def _first_fit(patterns: Mapping[str, T], weight: str, default: T) -> T:
    fits = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", weight))
    return next(fits, default)


class Shape(NamedTuple):
    """Size of a weight."""

    num_outputs: int
    num_inputs: int


class Pair(NamedTuple):
    """An adapter's own factors, scale not inside; float32."""

    a_RI: Array
    b_OR: Array


def find_targets(config: Any, task: Task, layout: Layout, lora: LoraConfig) -> dict[str, Shape]:
    """Return the weights of all blocks that *lora* adapts, by module name, in model order.

    Raises:
        ConfigError: nothing matches, or the rank exceeds a weight.
    """
    import torch
    from peft.tuners.lora import LoraModel

    from edge_sdk.model.layout import build_empty

    model = build_empty(config, task, torch.float32)
    names = lora.target_modules
    wanted = "all-linear" if "all-linear" in names else list(names)
    shapes = {name: _shape(m) for name, m in model.named_modules() if _shape(m)}
    try:
        tuner = LoraModel(model, {OWN: _peft_config(wanted, model, r=1)}, OWN)
    except ValueError:
        matched: set[str] = set()
    else:
        matched = set(tuner.targeted_module_names)
    found = {
        name: shape
        for name, shape in shapes.items()
        if shape and name in matched and name.startswith(f"{layout.blocks_path}.")
    }
    unused = [n for n in names if n != "all-linear" and not any(_ends(f, n) for f in found)]
    if not found or unused:
        leaves = sorted(
            {n.rsplit(".", 1)[1] for n in shapes if n.startswith(f"{layout.blocks_path}.")}
        )
        raise ConfigError(
            f"lora.target_modules: {', '.join(unused or names)!r} matches no weight in the blocks; "
            f"they have {', '.join(leaves)}"
        )
    return found


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _shape(module: nn.Module) -> Shape | None:
    """(O, I) of a linear layer, whatever its class calls them."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2 or type(module).__name__ == "Embedding":
        return None
    rows, columns = (int(n) for n in weight.shape)
    return Shape(columns, rows) if is_transposed(module) else Shape(rows, columns)


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer keeps its weight as (I, O)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _peft_config(targets: str | list[str], model: nn.Module, **settings: Any) -> Any:
    import peft

    transposed = any(is_transposed(m) for m in model.modules())
    return peft.LoraConfig(target_modules=targets, fan_in_fan_out=transposed, **settings)


def check_rank(name: str, rank: int, shape: Shape, key: str = "r") -> None:
    """Refuse a rank that the weight cannot have; *key* is what gave it."""
    if not 0 <= rank <= min(shape):
        raise ConfigError(
            f"{key}: rank {rank} for {name!r} is outside 0..{min(shape)} "
            f"(the weight is {shape.num_outputs} x {shape.num_inputs})"
        )


def initial_pair(name: str, rank: int, shape: Shape, seed: int) -> Pair:
    """A as `nn.Linear` draws it, B = 0; a smaller rank has the first rows of a larger one."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    bound = 1.0 / math.sqrt(shape.num_inputs)
    a_RI = generator.uniform(-bound, bound, (rank, shape.num_inputs)).astype(np.float32)
    return Pair(a_RI, np.zeros((shape.num_outputs, rank), np.float32))


class Adapters:
    """The trained adapters and frozen residuals of the weights that a slice holds."""

    def __init__(
        self,
        slice_: Slice,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        lora: LoraConfig,
    ) -> None:
        self._model = slice_.model
        self._lora = lora
        self._tuner: Any = None
        self.ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        self.alphas = {name: alphas.get(name, lora.alpha_of(name)) for name in self.ranks}
        self.residual: dict[str, Factors] = {}
        if self.ranks:
            self._inject(self.ranks, OWN, alpha_pattern=self.alphas)
        self._activate()

    def _inject(self, ranks: Mapping[str, int], adapter: str, **settings: Any) -> None:
        from peft.tuners.lora import LoraModel

        config = _peft_config(
            list(ranks),
            self._model,
            r=1,
            rank_pattern=dict(ranks),
            use_rslora=adapter == OWN and self._lora.use_rslora,
            lora_dropout=self._lora.lora_dropout if adapter == OWN else 0.0,
            **settings,
        )
        if self._tuner is None:
            self._tuner = LoraModel(self._model, {adapter: config}, adapter)
        else:
            self._tuner.peft_config[adapter] = config
            self._tuner.inject_adapter(self._model, adapter)

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {n: m for n, m in self._model.named_modules() if isinstance(m, LoraLayer)}

    def _activate(self) -> None:
        """Both adapters compute; only our own is trained, and in float32 whatever the base is."""
        for layer in self._layers().values():
            layer.set_adapter([a for a in (OWN, RESIDUAL) if a in layer.lora_A])
            for adapter in layer.lora_A:
                for linear in (layer.lora_A[adapter], layer.lora_B[adapter]):
                    linear.weight.data = linear.weight.data.float()
                    linear.weight.requires_grad_(adapter == OWN)

    def scale(self, name: str, rank: int | None = None) -> float:
        """The factor in front of the B A of weight *name*, if it had *rank*."""
        rank, alpha = rank or self.ranks[name], self.alphas[name]
        return alpha / math.sqrt(rank) if self._lora.use_rslora else alpha / rank

    def product(self, name: str, pair: Pair) -> Factors:
        """The matrix s B A of a pair for weight *name*, with the run's alpha."""
        return Factors(pair.b_OR * self._lora.scale(name, pair.a_RI.shape[0]), pair.a_RI)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained factors, as `<weight>.A` and `<weight>.B`, in model order."""
        layers = self._layers()
        return {
            f"{name}.{factor}": getattr(layers[name], f"lora_{factor}")[OWN].weight
            for name in self.ranks
            for factor in "AB"
        }

    def pairs(self) -> dict[str, Pair]:
        """Copies of the trained factors."""
        values = {n: p.detach().cpu().numpy().copy() for n, p in self.parameters().items()}
        return {n: Pair(values[f"{n}.A"], values[f"{n}.B"]) for n in self.ranks}

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite trained factors in place; the optimizer keeps its hold on them."""
        parameters = self.parameters()
        for name, pair in pairs.items():
            _overwrite(parameters[f"{name}.A"], pair.a_RI)
            _overwrite(parameters[f"{name}.B"], pair.b_OR)

    def products(self) -> dict[str, Factors]:
        """What the trained adapters add to their weights: s B A, scale inside."""
        return {n: Factors(p.b_OR * self.scale(n), p.a_RI) for n, p in self.pairs().items()}

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the frozen residual of the named weights; absent names keep theirs."""
        import torch

        new = {n: f for n, f in residual.items() if f.rank or n in self.residual}
        layers = self._layers()
        bare = [n for n in new if n not in layers or RESIDUAL not in layers[n].lora_A]
        if bare:
            self._inject(dict.fromkeys(bare, 1), RESIDUAL)
            self._activate()
            layers = self._layers()
        for name, factors in new.items():
            layer = layers[name]
            layer.scaling[RESIDUAL] = 1.0
            layer.r[RESIDUAL] = factors.rank
            for linear, value in (
                (layer.lora_A[RESIDUAL], factors.a_RI),
                (layer.lora_B[RESIDUAL], factors.b_OR),
            ):
                old = linear.weight
                data = torch.from_numpy(np.ascontiguousarray(value)).to(old.device)
                linear.weight = torch.nn.Parameter(data, requires_grad=False)
        self.residual.update(new)

    def zero_residual(self) -> dict[str, Factors]:
        """A residual of rank 0 for every weight that has one now."""
        return {n: zero(f.b_OR.shape[0], f.a_RI.shape[1]) for n, f in self.residual.items()}

    def most_bytes(self) -> int:
        """Upper bound for the float32 bytes of all factors and residuals of the present weights."""
        weights = (p for p in self._model.parameters() if p.dim() == 2 and not p.is_meta)
        return 4 * 4 * sum(sum(w.shape) * min(w.shape) for w in weights)


def _overwrite(parameter: nn.Parameter, value: Array) -> None:
    import torch

    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def head_names(slice_: Slice) -> tuple[str, ...]:
    """Parameters of a classifier's head, trained in full; empty for a causal LM."""
    if slice_.task == "causal-lm":
        return ()
    base = f"{getattr(slice_.model, 'base_model_prefix', '')}."
    return tuple(name for name in slice_.layout.tail if not name.startswith(base))


def named_parameters(slice_: Slice, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of a slice by whole-model name."""
    return {name: slice_.model.get_parameter(name) for name in names}
