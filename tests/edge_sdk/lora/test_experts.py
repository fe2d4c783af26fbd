"""Experts that a model stacks in one parameter are adapted, measured and quantised one by one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import ConfigError
from edge_sdk.lora.adapters import Adapters, Pair, initial_pair
from edge_sdk.lora.factors import Factors, compress, norm, stack
from edge_sdk.lora.importance import Form, ImportanceMeter
from edge_sdk.lora.targets import LoraConfig, Shape, coverage, find_targets
from edge_sdk.model.experts import Matrix, expert_weights, find_stack, take_place
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.quantized import Quantized
from edge_sdk.model.shape import model_shape
from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import estimate_memory
from profiler.estimate.sizes import Work
from tests.tiny import EXPERTS, make_config, make_micro, make_model, make_parts, task_of

CHANGES = {"num_hidden_layers": 2}
# Of these the parameter holds (E, I, O), as PEFT counts outputs and inputs.
TURNED = ("gpt_oss",)


class Known:
    """A tiny model with experts, looked at once."""

    def __init__(self, family: str) -> None:
        self.config, self.task = make_config(family, **CHANGES), task_of(family)
        self.layout: Layout = find_layout(self.config, self.task)
        self.model = make_model(self.config, self.task)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
        self.shapes = find_targets(self.config, self.task, self.layout, LoraConfig())
        self.stacks = [name for name, shape in self.shapes.items() if shape.num_experts]
        draw = np.random.default_rng(0)
        self.ranks = {name: 1 + i % 3 for i, name in enumerate(self.shapes)}
        self.pairs = {n: Pair(*self._factors(draw, n, rank)) for n, rank in self.ranks.items()}
        self.residual = {n: Factors(*self._factors(draw, n, 2)[::-1]) for n in self.stacks[::2]}

    def _factors(self, draw: Any, name: str, rank: int) -> tuple[Any, Any]:
        sizes = self.shapes[name].factors(rank)
        return tuple(draw.normal(0, 0.2, size).astype(np.float32) for size in sizes)  # type: ignore[return-value]

    def slice(self, kind: Quantized | None = None) -> Slice:
        """The whole model as a slice."""
        slice_ = Slice(self.config, self.task, self.layout, torch.float32, quantized=kind)
        parts = make_parts(self.model, self.layout, list(self.layout.part_names()))
        for name, tensors in parts.items():
            slice_.add(name, tensors)
        slice_.model.eval()
        return slice_

    def adapted(self, *, folds: bool = False) -> tuple[Slice, Adapters]:
        """The same with warm adapters, and residuals on some experts."""
        slice_ = self.slice()
        adapters = Adapters(slice_, self.ranks, {}, LoraConfig(), folds=folds)
        adapters.load_pairs(self.pairs)
        adapters.set_residual(self.residual)
        return slice_, adapters


@cache
def known(family: str) -> Known:
    """The tiny model of a family."""
    return Known(family)


def inputs(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and lengths."""
    return torch.from_numpy(micro.input_ids), torch.from_numpy(micro.lengths)


def logits(model: Any, micro: MicroBatch) -> torch.Tensor:
    """What transformers computes."""
    ids, lengths = inputs(micro)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


def parameter_of(model: Any, name: str, shape: Shape) -> torch.nn.Parameter:
    """The weight of a name, of a linear layer or of experts."""
    found: torch.nn.Parameter = model.get_parameter(name if shape.num_experts else f"{name}.weight")
    return found


def merged_model(family: str, added: dict[str, Factors]) -> Any:
    """The whole model with dense changes inside its weights."""
    k = known(family)
    model: Any = make_model(k.config, k.task)
    model.load_state_dict(k.model.state_dict())
    with torch.no_grad():
        for name, factors in added.items():
            change = torch.from_numpy(factors.dense())
            is_turned = family in TURNED and change.dim() == 3
            parameter_of(model, name, k.shapes[name]).add_(change.mT if is_turned else change)
    return model.eval()


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_and_residuals_add_up(family: str, folds: bool) -> None:
    """Logits and all gradients are those of the model with W + U V + s B A in its weights."""
    k, micro = known(family), make_micro(task_of(family), 1)
    slice_, adapters = k.adapted(folds=folds)
    added = adapters.products()
    added |= {n: stack([added[n], factors]) for n, factors in k.residual.items()}
    model = merged_model(family, added)

    found, expected = slice_.whole(*inputs(micro)), logits(model, micro)
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    found.backward(along)  # type: ignore[no-untyped-call]
    expected.backward(along)  # type: ignore[no-untyped-call]

    scale = float(expected.detach().abs().max())
    assert float((found - expected).detach().abs().max()) <= 2e-5 * scale
    parameters = adapters.parameters()
    for name, (a_RI, b_OR) in k.pairs.items():
        grad = parameter_of(model, name, k.shapes[name]).grad
        assert grad is not None
        dense = (grad.mT if family in TURNED and k.shapes[name].num_experts else grad).numpy()
        own = adapters.scale(name)
        for letter, due in (
            ("A", own * b_OR.swapaxes(-1, -2) @ dense),
            ("B", own * dense @ a_RI.swapaxes(-1, -2)),
        ):
            ours = parameters[f"{name}.{letter}"].grad
            assert ours is not None
            np.testing.assert_allclose(ours.numpy(), due, rtol=0, atol=3e-4 * np.abs(due).max())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_quantised_experts_compute_and_pass_gradients_on(family: str, kind: Quantized) -> None:
    """With adapters beside them, as the dense model with the dequantised weights does.

    Both ways to lie in memory; `test_quantized.py` has more families.
    """
    k = known(family)
    slice_ = k.slice(kind)
    dense = merged_model(family, {})
    for name, module in slice_.model.named_modules():
        if hasattr(module, "codes"):
            dense.get_submodule(name).weight.data = module.dequantize().contiguous()  # type: ignore[operator]
    for name, weight in expert_weights(dense).items():
        held = find_stack(slice_.model, name)
        assert held is not None
        weight.data = torch.stack([held.base(e) for e in range(weight.shape[0])])
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    again = hidden.detach().clone().requires_grad_()
    lengths = torch.tensor([5, 4])
    plain = Slice(k.config, k.task, k.layout, torch.float32)
    parts = make_parts(dense, k.layout, list(k.layout.part_names()))
    for name, tensors in parts.items():
        plain.add(name, tensors)
    plain.model.eval()

    found = slice_.middle(hidden, lengths, 0, 2)
    expected = plain.middle(again, lengths, 0, 2)
    for out in (found, expected):
        (out**2).sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-3, atol=1e-4)


class _Products(TorchFunctionMode):
    """Keeps every product with an expert's matrix."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self._weights = weights
        self.seen: list[tuple[str, torch.Tensor, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.Tensor.__matmul__, torch.Tensor.matmul, torch.bmm):
            name = self._weights.get(args[1].untyped_storage().data_ptr())
            if name is not None:
                result.retain_grad()
                self.seen.append((name, result.detach(), result))
        return result


@pytest.mark.parametrize("family", EXPERTS)
def test_importance_is_that_of_a_dense_model(family: str) -> None:
    """Every form, on the frozen experts alone: token by token, or from the dense gradient."""
    k, micro = known(family), make_micro(task_of(family), 3)
    model: Any = merged_model(family, {})
    if hasattr(model, "set_experts_implementation") and family != "llama4_text":
        model.set_experts_implementation("eager")
    own = expert_weights(model)
    places = {weight.untyped_storage().data_ptr(): name for name, weight in own.items()}
    with _Products(places) as products:
        (logits(model, micro) ** 2).sum().backward()
    due: dict[tuple[Form, str], float] = {}
    for name, weight in own.items():
        assert weight.grad is not None
        per_weight = weight.detach() * weight.grad
        dots = [(y * r.grad).sum(-1).abs().sum().detach() for n, y, r in products.seen if n == name]
        due["reference", name] = float(per_weight.abs().sum())
        due["signed", name] = float(per_weight.sum().abs())
        due["free", name] = float(torch.stack(dots).sum())

    for form in ("reference", "signed", "free"):
        slice_ = k.slice()
        meter = ImportanceMeter(slice_.model, own, form, 1)
        with meter.watching(0):
            out = slice_.whole(*inputs(micro))
        (out**2).sum().backward()  # type: ignore[no-untyped-call]
        meter.close_step(0)
        found = meter.take()
        assert found.keys() == own.keys()
        for name, value in found.items():
            assert value == pytest.approx(due[form, name], rel=1e-3), (form, name)


@pytest.mark.parametrize("family", EXPERTS)
def test_what_is_inside_the_experts_does_not_count(family: str) -> None:
    """A residual in the weights leaves every form of importance what it is with one beside them."""
    k, micro, found = known(family), make_micro(task_of(family), 3), []
    for folds in (False, True):
        slice_, adapters = k.adapted(folds=folds)
        for form in ("reference", "signed", "free"):
            meter = ImportanceMeter(slice_.model, k.shapes, form, 1, folded=adapters.folded)
            with meter.watching(0):
                out = slice_.whole(*inputs(micro))
            (out**2).sum().backward()  # type: ignore[no-untyped-call]
            meter.close_step(0)
            found.append(meter.take())

    for beside, inside in zip(found[:3], found[3:], strict=True):
        assert inside == pytest.approx(beside, rel=2e-3)


def test_any_operation_sees_the_adapted_weights() -> None:
    """What a model does with its experts otherwise is computed with dense weights."""
    k = known("mixtral")
    slice_, adapters = k.adapted()
    name = k.stacks[0]
    found = find_stack(slice_.model, name)
    assert found is not None
    factors = adapters.products()[name]
    change = stack([factors, k.residual[name]]).dense()
    dense = k.model.get_parameter(name).detach().numpy() + change

    assert found.shape == dense.shape
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    matrix = found[torch.tensor(2)]
    assert isinstance(matrix, Matrix)
    for ours, due in (
        (found.transpose(1, 2), dense.swapaxes(1, 2)),
        (found.sum(), dense.sum()),
        (found[1:3], dense[1:3]),
        (matrix.T, dense[2].T),
        (matrix.float() * 2, dense[2] * 2),
        (torch.einsum("eoi->ei", found), dense.sum(1)),
    ):
        np.testing.assert_allclose(ours.detach().numpy(), due, rtol=1e-4, atol=1e-4)
    (matrix.T**2).sum().backward()
    assert adapters.parameters()[f"{name}.A"].grad is not None


@pytest.mark.parametrize("family", EXPERTS)
def test_all_linear_includes_experts_unless_told_otherwise(family: str) -> None:
    """`lora.experts: false` leaves them out; a name brings single ones back."""
    k = known(family)
    assert k.stacks == [n for n in k.shapes if ".experts." in n]
    assert len(k.stacks) == (2 if family == "deepseek_v3" else 4)  # it has a block without

    def targets(**settings: Any) -> list[str]:
        return list(find_targets(k.config, k.task, k.layout, LoraConfig(**settings)))

    linear = [n for n in k.shapes if n not in k.stacks]
    assert targets(experts=False) == linear
    down = [n for n in k.stacks if n.endswith("down_proj")]
    assert targets(target_modules=("experts.down_proj",)) == down
    both = targets(target_modules=("all-linear", "experts.down_proj"), experts=False)
    assert both == [n for n in k.shapes if n in linear or n in down]


def test_dropout_on_experts_is_refused_as_in_peft() -> None:
    """One line says what to do, and `lora.experts: false` is one of the ways."""
    k = known("mixtral")
    with pytest.raises(ConfigError, match="lora.experts to false") as caught:
        find_targets(k.config, k.task, k.layout, LoraConfig(lora_dropout=0.1))
    assert "\n" not in str(caught.value)

    find_targets(k.config, k.task, k.layout, LoraConfig(lora_dropout=0.1, experts=False))


def test_every_expert_is_compressed_by_itself() -> None:
    """A stack has the best approximation of each matrix, and the norm of all together."""
    draw = np.random.default_rng(0)
    terms = [Factors(draw.normal(size=(3, 7, 5)), draw.normal(size=(3, 5, 6))) for _ in range(2)]
    total = stack(terms)

    cut, error = compress(total, 2)

    singles = [compress(Factors(b, a), 2)[0].dense() for b, a in zip(*total, strict=True)]
    np.testing.assert_allclose(cut.dense(), np.stack(singles), atol=1e-5)
    assert cut.b_OR.shape == (3, 7, 2)
    dense = total.dense()
    assert norm(total) == pytest.approx(np.linalg.norm(dense))
    assert error == pytest.approx(
        np.linalg.norm(dense - cut.dense()) / np.linalg.norm(dense), rel=1e-5
    )


def test_a_smaller_rank_draws_the_first_rows_of_every_expert() -> None:
    """Equal for all experts of a stack, and no two experts alike."""
    shape = Shape(3, 6, 5)
    large, small = initial_pair("w", 4, shape, 0), initial_pair("w", 2, shape, 0)

    assert large.a_RI.shape == (3, 4, 5)
    np.testing.assert_array_equal(small.a_RI, large.a_RI[:, :2])
    assert len({a_RI.tobytes() for a_RI in large.a_RI}) == 3
    assert not large.b_OR.any()


def test_the_place_is_taken_once() -> None:
    """Adapters and measuring share one stack of each parameter."""
    slice_ = known("mixtral").slice()
    name = known("mixtral").stacks[0]

    assert take_place(slice_.model, name) is take_place(slice_.model, name)


@pytest.mark.parametrize(
    ("settings", "text", "bare"),
    [
        ({}, "adapters on 12 of 14 block weights (99%); blocks without any: none", []),
        (
            {"experts": False},
            "adapters on 8 of 14 block weights (14%); blocks without any: none",
            ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        ),
        (
            {"target_modules": ("model.layers.1.mlp.experts.down_proj",)},
            "adapters on 1 of 14 block weights (14%); blocks without any: 0",
            [
                "mlp.experts.down_proj",  # of block 0
                "mlp.experts.gate_up_proj",
                *(f"self_attn.{letter}_proj" for letter in "kqov"),
            ],
        ),
    ],
)
def test_a_line_says_how_much_has_adapters(settings: Any, text: str, bare: list[str]) -> None:
    """Matrices and their numbers: projections, experts as one matrix each, and routers."""
    k = known("mixtral")
    targets = find_targets(k.config, k.task, k.layout, LoraConfig(**settings))

    found = coverage(k.config, k.task, k.layout, targets)

    assert found.text == text
    assert found.bare_weights == tuple(sorted(["mlp.gate", *bare]))
    sizes = {n: p.numel() for n, p in k.model.named_parameters() if n.startswith("model.layers.")}
    total = sum(size for name, size in sizes.items() if "norm" not in name)
    own = sum(shape.num_weights for shape in targets.values())
    assert found.share == pytest.approx(own / total)


def test_estimates_count_experts() -> None:
    """All experts lie in memory with factors of their own; a token is computed by two of them."""
    k = known("mixtral")
    shape = model_shape(k.config, k.task, k.layout)
    stacks = {li.name: li for li in shape.linears if li.num_experts > 1}

    assert {f"model.layers.0.{name}" for name in stacks} == set(k.stacks[:2])
    down = stacks["mlp.experts.down_proj"]
    assert (down.num_experts, down.num_active) == (4, 2)
    assert down.num_weights == 4 * 32 * 48
    ranks = {f"model.layers.0.{name}": 3 for name in stacks}
    settings: dict[str, Any] = {"has_front": True, "has_tail": False, "micro_batch": 2, "length": 5}
    work = Work(first=0, stop=1, ranks=ranks, linear_bytes=1.0, **settings)
    bare = Work(first=0, stop=1, ranks={}, linear_bytes=1.0, **settings)
    with_adapters, without = estimate_memory(shape, work), estimate_memory(shape, bare)
    factors = sum(3 * 4 * (li.num_outputs + li.num_inputs) for li in stacks.values())
    assert with_adapters.adapters == 4 * factors
    norms = 4 * 2 * 32
    packed = sum(li.num_weights for li in shape.linears)
    assert without.base == norms + packed + 4 * shape.front_params
    forward = estimate_flops(shape, work).forward - estimate_flops(shape, bare).forward
    tokens = 10
    assert forward == sum(
        2 * tokens * 2 * 3 * (li.num_outputs + li.num_inputs) for li in stacks.values()
    )
