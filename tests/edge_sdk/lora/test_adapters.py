"""Adapters and residuals add exactly what their factors say to the weights that were asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.errors import ConfigError
from edge_sdk.lora.adapters import Adapters, Pair, initial_pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, Shape, check_rank, find_targets
from edge_sdk.model.layout import Layout
from edge_sdk.model.partition import Slice, head_names
from tests.tiny import BLOCKS, layout_of, make_config, make_model, make_parts, task_of

FAMILIES = ["llama", "gpt2", "bert"]


@cache
def known(family: str) -> tuple[Any, Layout, dict[str, Shape]]:
    """Config, layout and all adaptable weights of a family."""
    config, layout = make_config(family), layout_of(family)
    return config, layout, find_targets(config, task_of(family), layout, LoraConfig())


def make_slice(family: str) -> Slice:
    """The whole tiny model."""
    config, layout, _ = known(family)
    slice_ = Slice(config, task_of(family), layout, torch.float32)
    model = make_model(config, task_of(family))
    for name, tensors in make_parts(model, layout, list(layout.part_names())).items():
        slice_.add(name, tensors)
    return slice_


def random_factors(shape: Shape, rank: int, seed: int = 0) -> Factors:
    """A small random matrix."""
    generator = np.random.default_rng(seed)
    b_OR = generator.normal(0, 0.1, (shape.num_outputs, rank)).astype(np.float32)
    return Factors(b_OR, generator.normal(0, 0.1, (rank, shape.num_inputs)).astype(np.float32))


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_and_residual_add_up(family: str, use_rslora: bool, folds: bool) -> None:
    """The model computes W + U V + s B A for every mixture of ranks, residual in W or beside it."""
    config, _, shapes = known(family)
    lora = LoraConfig(r=4, lora_alpha=6.0, use_rslora=use_rslora)
    slice_ = make_slice(family)
    names = list(shapes)
    ranks = {n: 1 + i % 4 for i, n in enumerate(names) if i % 3}
    adapters = Adapters(slice_, ranks, {}, lora, folds=folds)
    own = {n: random_factors(shapes[n], r) for n, r in ranks.items()}
    adapters.load_pairs({n: Pair(f.a_RI, f.b_OR) for n, f in own.items()})
    residual = {n: random_factors(shapes[n], 2 + i % 2, 1) for i, n in enumerate(names) if i % 2}
    adapters.set_residual(residual)
    reference: Any = make_model(config, task_of(family)).eval()
    for name in names:
        change = np.zeros(shapes[name], np.float64)
        if name in own:
            scale = 6.0 / (np.sqrt(ranks[name]) if use_rslora else ranks[name])
            assert adapters.scale(name) == pytest.approx(scale)
            change += scale * own[name].dense()
        if name in residual:
            change += residual[name].dense()
        weight = reference.get_submodule(name).weight
        dense = torch.from_numpy(change.astype(np.float32))
        with torch.no_grad():
            weight += dense.T if family == "gpt2" else dense
    ids = torch.randint(3, 90, (2, 6))
    slice_.model.eval()

    with torch.no_grad():
        found = slice_.whole(ids, torch.tensor([6, 6]))
        expected = reference(input_ids=ids).logits

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    trained = {n for n, p in slice_.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(ranks) == len(adapters.parameters())


def test_factors_come_out_as_they_went_in() -> None:
    """pairs() gives copies of what load_pairs() was given, and products() puts the scale inside."""
    _, _, shapes = known("llama")
    name = next(iter(shapes))
    adapters = Adapters(make_slice("llama"), {name: 3}, {name: 12.0}, LoraConfig())
    given = Pair(*reversed(random_factors(shapes[name], 3)))

    adapters.load_pairs({name: given})
    taken = adapters.pairs()[name]
    adapters.load_pairs({name: Pair(given.a_RI + 1, given.b_OR + 1)})

    assert np.array_equal(taken.a_RI, given.a_RI)
    assert np.array_equal(taken.b_OR, given.b_OR)
    expected = 4.0 * (given.b_OR + 1) @ (given.a_RI + 1)
    np.testing.assert_allclose(adapters.products()[name].dense(), expected, rtol=1e-5)


def test_a_rank_of_zero_is_no_adapter() -> None:
    """Weights of rank 0 are left alone; a later residual still finds them."""
    _, _, shapes = known("llama")
    name = next(iter(shapes))
    adapters = Adapters(make_slice("llama"), {name: 0}, {}, LoraConfig())

    adapters.set_residual({name: random_factors(shapes[name], 2)})

    assert adapters.parameters() == {}
    assert adapters.residual[name].rank == 2
    assert adapters.zero_residual()[name].rank == 0


def test_a_smaller_rank_begins_like_a_larger_one() -> None:
    """First factors depend on seed and name only, and start from B = 0."""
    small, large = (initial_pair("w", rank, Shape(5, 7), seed=3) for rank in (2, 4))

    assert np.array_equal(large.a_RI[:2], small.a_RI)
    assert not large.b_OR.any()
    assert np.abs(large.a_RI).max() <= 1 / np.sqrt(7)
    assert not np.array_equal(initial_pair("v", 2, Shape(5, 7), 3).a_RI, small.a_RI)
    assert not np.array_equal(initial_pair("w", 2, Shape(5, 7), 4).a_RI, small.a_RI)


@pytest.mark.parametrize(
    ("family", "target", "per_block"),
    [("llama", "q_proj", 1), ("gpt2", "c_proj", 2), ("bert", "attention.self.query", 1)],
)
def test_targets_are_named_as_in_peft(family: str, target: str, per_block: int) -> None:
    """A name's last parts choose that layer in every block, with the weight's true size."""
    config, layout, shapes = known(family)

    found = find_targets(config, task_of(family), layout, LoraConfig(target_modules=(target,)))

    assert len(found) == per_block * BLOCKS
    assert all(found[name] == shapes[name] for name in found)
    if family == "gpt2":
        assert found["transformer.h.0.mlp.c_proj"] == Shape(32, 128)


@pytest.mark.parametrize("targets", [("absent",), ("q_proj", "absent"), ("norm",)])
def test_a_target_that_matches_nothing_is_refused(targets: tuple[str, ...]) -> None:
    """The message says what there is instead."""
    config, layout, _ = known("llama")

    with pytest.raises(ConfigError, match=r"matches no weight in the blocks; they have .*q_proj"):
        find_targets(config, "causal-lm", layout, LoraConfig(target_modules=targets))


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_beyond_the_weight_is_refused(rank: int) -> None:
    """A matrix of 5 x 7 has ranks 0 to 5."""
    with pytest.raises(ConfigError, match=rf"rank {rank} for 'w' is outside 0\.\.5"):
        check_rank("w", rank, Shape(5, 7))
    check_rank("w", 5, Shape(5, 7))


def test_only_classifiers_have_a_trained_head() -> None:
    """The head is what lies outside the base model."""
    assert head_names(make_slice("llama")) == ()
    assert head_names(make_slice("bert")) == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("change", [{"r": 0}, {"lora_dropout": 1.0}, {"target_modules": ()}])
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    """The message names the setting."""
    (name,) = change
    with pytest.raises(ValueError, match=name):
        LoraConfig(**change)
