"""PEFT's LoRA layers on the present blocks of a slice: factors in and out, residual, head.

Each adapted weight computes `W x + U V x + s B A x`: W frozen, U V the frozen residual
(docs/method.md, Aggregation), s B A the trained adapter; or `(W + U V) x + s B A x`, with the sum
made once a round in `folding.py`. Knows no optimizer, no network and no aggregation rule.

PEFT computes with linear layers. Experts that a model stacks in one parameter are its
`target_parameters` and stand in `expert_adapters.py`.

Legend: E experts, R rank, I inputs, O outputs, S rank of the residual.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_sdk.lora.factors import Array, Factors, compress, zero_like
from edge_sdk.lora.folding import FoldedWeights
from edge_sdk.lora.targets import OWN, LoraConfig, Shape, peft_config

if TYPE_CHECKING:
    from torch import nn

    from edge_sdk.model.partition import Slice

log = logging.getLogger(__name__)

RESIDUAL = "residual"


class Pair(NamedTuple):
    """An adapter's own factors, scale not inside; float32. Of experts, (E, R, I) and (E, O, R)."""

    a_RI: Array
    b_OR: Array


def initial_pair(name: str, rank: int, shape: Shape, seed: int) -> Pair:
    """Draw A as `nn.Linear` does, B = 0; a smaller rank has the first rows of a larger one."""
    if shape.num_experts:
        one = Shape(shape.num_outputs, shape.num_inputs)
        own = (initial_pair(f"{name} {e}", rank, one, seed) for e in range(shape.num_experts))
        a_ERI, b_EOR = (np.stack(factors) for factors in zip(*own, strict=True))
        return Pair(a_ERI, b_EOR)
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
        *,
        folds: bool = False,
        most_beside: int = 0,
    ) -> None:
        """Put adapters of *ranks* on a slice.

        Args:
            slice_: The blocks.
            ranks: Rank of each weight; 0 stands for none.
            alphas: LoRA alpha of each; the config's where it is not named.
            lora: LoRA configuration of the run.
            folds: Whether residuals are added to the frozen weights; else they stand beside them.
            most_beside: Most ranks that stand there; 0: all that a residual has.
        """
        from edge_sdk.lora.expert_adapters import ExpertAdapters

        self._model = slice_.model
        self._lora = lora
        self._tuner: Any = None
        self._blocks_path = slice_.layout.blocks_path
        self._experts = ExpertAdapters(slice_.model)
        self.ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        self.alphas = {name: alphas.get(name, lora.alpha_of(name)) for name in self.ranks}
        self.residual: dict[str, Factors] = {}
        self._folded = FoldedWeights(slice_) if folds else None
        self._most_beside = most_beside
        linear = {n: rank for n, rank in self.ranks.items() if n not in self._experts.shapes}
        if linear:
            self._inject(linear, OWN, alpha_pattern={n: self.alphas[n] for n in linear})
        self._activate()
        for name in self.ranks.keys() - linear.keys():
            # Whoever trains loads the factors of the run over them, as over those that PEFT draws.
            pair = initial_pair(name, self.ranks[name], self._experts.shapes[name], seed=0)
            self._experts.add(name, OWN, pair, self.scale(name), trained=True)

    def _inject(self, ranks: Mapping[str, int], adapter: str, **settings: Any) -> None:
        from peft.tuners.lora import LoraModel

        config = peft_config(
            list(ranks),
            self._model,
            r=1,
            rank_pattern=dict(ranks),
            use_rslora=adapter == OWN and self._lora.use_rslora,
            lora_dropout=self._lora.lora_dropout if adapter == OWN else 0.0,
            **settings,
        )
        if self._tuner is None:
            # Without the model's config: PEFT would read it and mend names of earlier versions of
            # transformers, which ours are not.
            bare = _bare(self._model, self._blocks_path)
            self._tuner = LoraModel(bare, {adapter: config}, adapter)
        else:
            self._tuner.peft_config[adapter] = config
            self._tuner.inject_adapter(self._tuner.model, adapter)

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {n: m for n, m in self._model.named_modules() if isinstance(m, LoraLayer)}

    def _activate(self) -> None:
        """Let both adapters compute; only ours is trained, in float32 whatever the base is."""
        for layer in self._layers().values():
            layer.set_adapter([a for a in (OWN, RESIDUAL) if a in layer.lora_A])
            for adapter in layer.lora_A:
                for linear in (layer.lora_A[adapter], layer.lora_B[adapter]):
                    linear.weight.data = linear.weight.data.float()
                    linear.weight.requires_grad_(adapter == OWN)

    def scale(self, name: str, rank: int | None = None) -> float:
        """Return the factor in front of the B A of weight *name*, if it had *rank*."""
        rank, alpha = rank or self.ranks[name], self.alphas[name]
        return alpha / math.sqrt(rank) if self._lora.use_rslora else alpha / rank

    def product(self, name: str, pair: Pair) -> Factors:
        """Return the matrix s B A of a pair for weight *name*, with the run's alpha."""
        return Factors(pair.b_OR * self._lora.scale(name, pair.a_RI.shape[-2]), pair.a_RI)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained factors, as `<weight>.A` and `<weight>.B`, in model order."""
        layers = self._layers()
        found: dict[str, nn.Parameter] = {}
        for name in self.ranks:
            if name in self._experts.shapes:
                a, b = self._experts.factors(name, OWN)
            else:
                a, b = layers[name].lora_A[OWN].weight, layers[name].lora_B[OWN].weight
            found |= {f"{name}.A": a, f"{name}.B": b}
        return found

    def pairs(self) -> dict[str, Pair]:
        """Return copies of the trained factors."""
        values = {n: p.detach().cpu().numpy().copy() for n, p in self.parameters().items()}
        return {n: Pair(values[f"{n}.A"], values[f"{n}.B"]) for n in self.ranks}

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite trained factors in place; the optimizer keeps its hold on them."""
        parameters = self.parameters()
        for name, pair in pairs.items():
            _overwrite(parameters[f"{name}.A"], pair.a_RI)
            _overwrite(parameters[f"{name}.B"], pair.b_OR)

    def products(self) -> dict[str, Factors]:
        """Return what the trained adapters add to their weights: s B A, scale inside."""
        return {n: Factors(p.b_OR * self.scale(n), p.a_RI) for n, p in self.pairs().items()}

    @property
    def folded(self) -> Mapping[str, Factors]:
        """The residuals that are inside the frozen weights, by weight."""
        return self.residual if self._folded else {}

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the frozen residual of the named weights; absent names keep theirs."""
        new = {n: f for n, f in residual.items() if f.rank or n in self.residual}
        self.residual.update(new)
        if self._folded:
            self._fold(self._folded, new)
        else:
            self._set_beside(self._cut(new))

    def _fold(self, weights: FoldedWeights, new: Mapping[str, Factors]) -> None:
        """Let frozen weights be what they were at first and their residual."""
        from edge_sdk.model.experts import lies_transposed
        from edge_sdk.model.layout import is_transposed

        for name, factors in new.items():
            if name in self._experts.shapes:
                owner = self._model.get_submodule(name.rpartition(".")[0])
                weights.fold(name, factors, is_transposed=lies_transposed(owner))
            else:
                layer: Any = self._model.get_submodule(name)
                turned = is_transposed(getattr(layer, "base_layer", layer))
                weights.fold(f"{name}.weight", factors, is_transposed=turned)

    def _cut(self, new: dict[str, Factors]) -> dict[str, Factors]:
        """Return residuals of as many ranks as a step may compute with; `residual` keeps all."""
        most = self._most_beside
        if not most or all(factors.rank <= most for factors in new.values()):
            return new
        found = {n: compress(f, most) if f.rank > most else (f, 0.0) for n, f in new.items()}
        worst = max(found, key=lambda name: found[name][1])
        log.info("residual.cut ranks=%d worst=%s error=%.3g", most, worst, found[worst][1])
        return {name: factors for name, (factors, _) in found.items()}

    def _set_beside(self, new: dict[str, Factors]) -> None:
        """Let residuals stand beside their frozen weights."""
        import torch

        for name in new.keys() & self._experts.shapes.keys():
            b_EOR, a_ERI = new.pop(name)
            self._experts.add(name, RESIDUAL, (a_ERI, b_EOR), 1.0, trained=False)
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

    def zero_residual(self) -> dict[str, Factors]:
        """Return a residual of rank 0 for every weight that has one now."""
        return {n: zero_like(f) for n, f in self.residual.items()}

    def most_bytes(self) -> int:
        """Return an upper bound for the float32 bytes of all present factors and residuals."""
        weights = (p for p in self._model.parameters() if p.dim() == 2 and not p.is_meta)
        linear = sum(sum(w.shape) * min(w.shape) for w in weights)
        return 4 * 4 * (linear + self._experts.most_numbers())


def _bare(model: nn.Module, blocks_path: str) -> nn.Module:
    """Return a module in which the blocks have their names, and nothing else is."""
    from torch import nn

    inner = model.get_submodule(blocks_path)
    for name in reversed(blocks_path.split(".")):
        outer = nn.Module()
        outer.add_module(name, inner)
        inner = outer
    return inner


def _overwrite(parameter: nn.Parameter, value: Array) -> None:
    import torch

    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
