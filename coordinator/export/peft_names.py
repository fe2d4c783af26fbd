"""What PEFT calls the weights of an adapter, and how it lays their factors down.

A linear layer is a target module. Experts that a model stacks in one parameter are a target
parameter: their factors lie flat, A (E R, I) expert by expert and B (O, R E) rank by rank, and of
several parameters of one module each wraps those before it, which stands in the names.

Legend: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from edge_sdk.lora.factors import Array, Factors, stack, zero_like


def as_peft(
    model: nn.Module,
    factors: Mapping[str, Factors],
    settings: Mapping[str, Any],
    *,
    is_uniform: bool = False,
) -> tuple[Any, dict[str, Array]]:
    """Return PEFT's configuration of an adapter, and its tensors by the names of PEFT.

    Linear layers may have their own ranks. Target parameters have one, filled up with zeros: PEFT
    would say of their patterns that it ignores them, and other readers do.

    Args:
        model: The whole model, with or without numbers.
        factors: The adapter, by weight; no rank is 0.
        settings: What else the configuration says.
        is_uniform: Whether all weights have one rank, so that none needs a pattern.
    """
    config_of = partial(_config, settings=settings, is_uniform=is_uniform)
    parameters = {n: n for n, term in factors.items() if is_stacked(term)}
    config = config_of(factors, parameters)
    if parameters and not _is_read_as_written(config, model):
        # PEFT mends names of earlier versions of transformers, in which experts were linear layers,
        # and takes linear layers of today for these; it leaves target parameters alone.
        parameters = {n: n if n in parameters else f"{n}.weight" for n in factors}
    rank = max((factors[n].rank for n in parameters), default=0)
    filled = {n: pad(f, rank) if n in parameters else f for n, f in factors.items()}
    return config_of(filled, parameters), _tensors(model, filled)


def _config(
    factors: Mapping[str, Factors],
    parameters: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    is_uniform: bool,
) -> Any:  # noqa: ANN401 - PEFT's
    import peft

    ranks = {n: f.rank for n, f in factors.items()}
    modules = {n: rank for n, rank in ranks.items() if n not in parameters}
    rank = max(ranks[n] for n in parameters or ranks)
    own = {} if is_uniform else modules
    return peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters.values()) or None,
        rank_pattern=own,
        alpha_pattern=dict(own),
        **settings,
    )


def _is_read_as_written(config: Any, model: nn.Module) -> bool:  # noqa: ANN401 - PEFT's
    from peft.utils import transformers_weight_conversion

    probe = copy.deepcopy(config)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(probe, model, None)
    except ValueError:
        return False
    return set(probe.target_modules) == set(config.target_modules)


def pad(term: Factors, rank: int) -> Factors:
    """Return the same matrix with *rank* ranks, the further ones zeros."""
    return stack([term, zero_like(term, rank - term.rank)])


def _tensors(model: nn.Module, factors: Mapping[str, Factors]) -> dict[str, Array]:
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    found: dict[str, Array] = {}
    wrappers: Counter[str] = Counter()
    for name in sorted(factors, key=lambda n: -order.get(n, 0)):
        b_OR, a_RI = factors[name]
        place = name
        if is_stacked(factors[name]):
            path = name.rpartition(".")[0]
            place = path + ".base_layer" * wrappers[path]
            wrappers[path] += 1
            a_RI = a_RI.reshape(-1, a_RI.shape[-1])
            b_OR = b_OR.transpose(1, 2, 0).reshape(b_OR.shape[1], -1)
        key = f"base_model.model.{place}.lora_"
        found |= {f"{key}A.weight": a_RI, f"{key}B.weight": b_OR}
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


def is_stacked(term: Factors) -> bool:
    """Return whether there is a matrix for each of several experts."""
    return term.a_RI.ndim == 3
