"""A quantised base computes with weights half a step from the original, and keeps nothing else."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from coordinator.export.adapter import export_adapter
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.lora.importance import Form
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model import quantized
from edge_sdk.model.experts import expert_weights, find_stack
from edge_sdk.model.layout import find_layout
from edge_sdk.model.partition import CPU, Slice
from edge_sdk.model.precision import LINEAR_BYTES, Base, autocast
from edge_sdk.model.quantized import (
    GROUP,
    Quantized,
    QuantizedConv1D,
    QuantizedLinear,
    pack,
    quantize_linears,
    unpack,
)
from edge_sdk.model.shape import model_shape
from edge_sdk.model.weights import ModelSource, open_part
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from profiler.estimate.memory import estimate_memory
from profiler.estimate.sizes import Work
from tests.e2e.cluster import Cluster, save_model, wait_all
from tests.tiny import (
    BLOCKS,
    FAMILIES,
    OTHERS,
    layout_of,
    make_config,
    make_micro,
    make_model,
    make_parts,
    num_targets,
    task_of,
)

KINDS: list[Quantized] = ["int8", "int4"]
LAYERS = (QuantizedLinear, QuantizedConv1D)
LORA = LoraConfig(r=3, lora_alpha=6.0)
both = pytest.mark.parametrize("kind", KINDS)


# ---- numbers -------------------------------------------------------------------------------------


def steps(kind: Quantized, scales: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """The step of each weight."""
    size = 1 if kind == "int4" else num_inputs
    return scales.float().abs().repeat_interleave(GROUP if size == 1 else size, 1)[:, :num_inputs]


@both
@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3 * GROUP), st.integers(-30, 30))
def test_a_weight_comes_back_within_half_a_step(
    kind: Quantized, seed: int, rows: int, columns: int, power: int
) -> None:
    """Whatever the size, the shape and the shift of the weights."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(rows, 1, generator=generator)
    w_OI = (torch.randn(rows, columns, generator=generator) + shift) * 2.0**power

    codes, scales = pack(w_OI, kind)
    found = unpack(codes, scales, columns)

    assert ((found - w_OI).abs() <= 0.5001 * steps(kind, scales, columns)).all()


def test_a_step_is_what_the_range_asks_for() -> None:
    """An int8 step is 1/127 of the largest weight, an int4 step 1/8 of it, or 1/7.47 at most."""
    w_OI = torch.randn(8, 2 * GROUP)

    eight, four = (steps(kind, pack(w_OI, kind)[1], 2 * GROUP) for kind in KINDS)

    most = w_OI.abs().amax(1, keepdim=True)
    torch.testing.assert_close(eight, (most / 127).expand_as(eight))
    most = w_OI.view(8, 2, GROUP).abs().amax(2).repeat_interleave(GROUP, 1)
    assert (four >= 0.996 * most / 8).all()
    assert (four <= 1.004 * most / 7.47).all()


@both
def test_zeros_stay_zeros(kind: Quantized) -> None:
    """A row or group of zeros has no scale to divide by."""
    w_OI = torch.zeros(3, GROUP + 5)
    w_OI[0, GROUP:] = 1.0

    assert torch.equal(unpack(*pack(w_OI, kind), GROUP + 5)[1:], w_OI[1:])
    assert torch.equal(unpack(*pack(w_OI, kind), GROUP + 5)[0, :GROUP], w_OI[0, :GROUP])


def test_two_codes_share_a_byte_and_come_back() -> None:
    """All pairs of codes survive, and bytes are read as plain arithmetic reads them."""
    pairs = np.array([(low, high) for low in range(-8, 8) for high in range(-8, 8)])
    codes_OI = np.concatenate([pairs[:, 0], pairs[:, 1]]).reshape(1, -1)
    codes_OI[:, ::GROUP] = -8  # the whole range, so that the scale is known
    w_OI = torch.from_numpy(codes_OI * 0.25).float()

    packed, scales = pack(w_OI, "int4")

    assert (packed.dtype, packed.numel()) == (torch.int8, codes_OI.size // 2)
    assert torch.equal(scales, torch.full_like(scales, 0.25))
    assert torch.equal(unpack(packed, scales, codes_OI.size), w_OI)
    whole = packed.numpy().astype(np.int64) % 256
    nibbles = np.concatenate([whole % 16, whole // 16], axis=1)
    np.testing.assert_array_equal(np.where(nibbles > 7, nibbles - 16, nibbles), codes_OI)


@both
def test_packing_again_changes_nothing(kind: Quantized) -> None:
    """What has been quantised once is a fixed point."""
    w_OI = unpack(*pack(torch.randn(6, 70), kind), 70)

    torch.testing.assert_close(unpack(*pack(w_OI, kind), 70), w_OI, rtol=0.02, atol=1e-6)


def test_a_weight_that_is_not_finite_is_not_hidden() -> None:
    """NaN and infinity come back as NaN: training on them fails as it would without quantising."""
    for kind in KINDS:
        for bad in (float("nan"), float("inf")):
            w_OI = torch.ones(2, GROUP)
            w_OI[1, 3] = bad
            found = unpack(*pack(w_OI, kind), GROUP)
            assert found[0].isfinite().all()
            assert found[1].isnan().any()


# ---- layers --------------------------------------------------------------------------------------


def make_layer(kind: Quantized, transposed: bool, outputs: int = 37, inputs: int = 70) -> Any:
    """A quantised layer with a bias, and the dense layer with the weight that it computes with."""
    torch.manual_seed(0)
    dense: Any = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
    nn.init.normal_(dense.bias)
    box = nn.Module()
    box.layer = (Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)).to("meta")
    quantize_linears(box, kind)
    layer: Any = box.layer
    layer.take(dense.weight.detach(), CPU)
    layer.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    dense.weight.data = layer.dequantize()
    return layer, dense.requires_grad_(False)


@both
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("chunk", [1 << 20, 300], ids=["at once", "in stretches"])
def test_a_layer_equals_the_dense_one(
    kind: Quantized, transposed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradient are those of a dense layer with the dequantised weight, to 1e-6."""
    monkeypatch.setitem(quantized.CHUNK, "cpu", chunk)
    layer, dense = make_layer(kind, transposed)
    x = torch.randn(2, 5, 70)
    grad = torch.randn(2, 5, 37)
    found, expected = (x.clone().requires_grad_(True) for _ in range(2))

    y, wanted = layer(found), dense(expected)
    y.backward(grad)
    wanted.backward(grad)

    assert found.grad is not None
    assert expected.grad is not None
    for ours, theirs in ((y.detach(), wanted.detach()), (found.grad, expected.grad)):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_casts_as_autocast_does(kind: Quantized, dtype: torch.dtype) -> None:
    """Under autocast dtypes are those of the dense layer, and numbers too, up to rounding."""
    layer, dense = make_layer(kind, transposed=False)
    x, wanted_x = (torch.randn(4, 70).requires_grad_(True) for _ in range(2))
    wanted_x.data = x.data.clone()

    with torch.autocast("cpu", dtype=dtype):
        y, wanted = layer(x), dense(wanted_x)
    y.float().sum().backward()
    wanted.float().sum().backward()

    assert (y.dtype, x.grad.dtype) == (wanted.dtype, torch.float32)  # type: ignore[union-attr]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=8 * tolerance)
    torch.testing.assert_close(x.grad, wanted_x.grad, rtol=tolerance, atol=8 * tolerance)


@both
def test_nothing_is_kept_for_the_backward_pass(kind: Quantized) -> None:
    """Between forward and backward pass autograd holds neither weight nor input."""
    layer, _ = make_layer(kind, transposed=False)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(3, 70, requires_grad=True))

    assert kept == []


@both
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_the_weight_is_dense_to_whoever_computes_with_it(kind: Quantized, transposed: bool) -> None:
    """Shape, dtype and device cost nothing; any operation sees the dequantised weight."""
    layer, dense = make_layer(kind, transposed)

    weight = layer.weight

    with pytest.raises(RuntimeError):  # noqa: PT011 - torch words it in its own way, each time
        weight.untyped_storage().data_ptr()
    assert (weight.shape, weight.dtype, weight.device) == (dense.weight.shape, torch.float32, CPU)
    assert torch.equal(weight + 0, dense.weight)
    x = torch.randn(3, weight.shape[1], requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, dense.weight.sum(0).expand_as(x))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_a_gpu_packs_the_same_bits(kind: Quantized, transposed: bool) -> None:
    """CUDA and CPU quantise alike, and compute alike."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer, dense = make_layer(kind, transposed)
    codes, scales = layer.codes.clone(), layer.scales.clone()
    x = torch.randn(4, 70)

    layer.take(dense.weight, torch.device("cuda"))
    layer.bias.data = layer.bias.data.cuda()

    assert torch.equal(layer.scales.cpu(), scales)
    assert (layer.codes.cpu() == codes).float().mean() > 0.99  # ties may go either way
    torch.testing.assert_close(layer(x.cuda()).cpu(), dense(x), rtol=1e-3, atol=1e-3)


# ---- slices --------------------------------------------------------------------------------------


class Counted(Mapping[str, torch.Tensor]):
    """Hands out fresh tensors, and looks how many of the large ones are still alive then."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], large: int) -> None:
        self._tensors, self._large = tensors, large
        self._given: list[Any] = []
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self._given = [ref for ref in self._given if ref() is not None]
        fresh = self._tensors[name].clone()
        if fresh.numel() >= self._large:
            self._given.append(weakref.ref(fresh))
        self.most = max(self.most, len(self._given))
        return fresh

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def make_slice(family: str, kind: Quantized | None, parts: Mapping[str, Any]) -> Slice:
    """A slice with the named parts."""
    config, task = make_config(family), task_of(family)
    made = Slice(config, task, layout_of(family), torch.float32, CPU, kind)
    for name, tensors in parts.items():
        made.add(name, tensors)
    made.model.eval()
    return made


def whole(family: str) -> dict[str, Any]:
    """All parts of a tiny model."""
    layout = layout_of(family)
    model = make_model(make_config(family), task_of(family))
    return make_parts(model, layout, list(layout.part_names()))


def layers_of(slice_: Slice) -> dict[str, Any]:
    """The quantised layers of a slice."""
    return {n: m for n, m in slice_.model.named_modules() if isinstance(m, LAYERS)}


def dense_parts(parts: Mapping[str, Any], slice_: Slice) -> dict[str, Any]:
    """*parts* with the weights that a quantised slice of them computes with."""
    dense = {f"{n}.weight": layer.dequantize() for n, layer in layers_of(slice_).items()}
    for name, weight in expert_weights(slice_.model).items():
        stack = find_stack(slice_.model, name)
        assert stack is not None
        dense[name] = torch.stack([stack.base(expert) for expert in range(weight.shape[0])])
    return {p: {n: dense.get(n, t) for n, t in own.items()} for p, own in parts.items()}


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "int4") for family in (*FAMILIES, *OTHERS)), ("gpt2", "int8"), ("llama", "int8")],
)
def test_every_family_runs_split_and_whole(family: str, kind: Quantized) -> None:
    """A quantised slice, cut or not, equals the dense model with its dequantised weights."""
    parts = whole(family)
    slice_ = make_slice(family, kind, parts)
    reference = make_slice(family, None, dense_parts(parts, slice_))
    micro = make_micro(task_of(family), 0)
    ids, lengths = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.lengths)

    with torch.no_grad():
        found = slice_.whole(ids, lengths)
        cut = slice_.front(ids, lengths, 2)
        cut = slice_.middle(cut, lengths, 2, 4)
        cut = slice_.logits(cut, lengths, 4)
        expected = reference.whole(ids, lengths)

    blocks = slice_.layout.blocks_path
    inside = {n for n in find_all_linears(reference) if n.startswith(f"{blocks}.")}
    assert layers_of(slice_).keys() == inside
    torch.testing.assert_close(cut, found, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def find_all_linears(slice_: Slice) -> set[str]:
    """Names of all linear layers."""
    return {n for n, m in slice_.model.named_modules() if type(m) in (nn.Linear, Conv1D)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_weights_come_one_at_a_time(family: str) -> None:
    """While a slice is quantised, no second one of the checkpoint's weights is alive, ever."""
    parts = {n: Counted(t, 32 * 32) for n, t in whole(family).items() if n.startswith("block.")}

    slice_ = make_slice(family, "int4", parts)

    assert {counted.most for counted in parts.values()} == {1}
    tensors = [t for b in slice_.blocks for t in (*b.parameters(), *b.buffers())]
    assert sum(t.untyped_storage().nbytes() for t in tensors) < 0.35 * sum(
        t.nbytes for counted in parts.values() for t in counted.values()
    )


def test_a_streamed_file_goes_with_its_tensors(tmp_path: Path) -> None:
    """Streamed tensors are the file's, and what is not kept is not mapped any longer."""
    model: Any = make_model(make_config("llama"), "causal-lm")
    model.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), "causal-lm", is_streamed=True)
    path = tmp_path / "part.safetensors"
    path.write_bytes(source.pack("block.1"))
    state = model.state_dict()

    streamed = open_part(path, is_streamed=True)

    assert list(source.tensors("block.1")) == list(source.layout.part("block.1"))
    assert all(torch.equal(value, state[name]) for name, value in streamed.items())
    assert all(torch.equal(v, state[n]) for n, v in source.tensors("block.1").items())
    maps = Path("/proc/self/maps")
    if maps.exists():
        kept = streamed[next(iter(streamed))]
        assert str(path) in maps.read_text()
        del kept
        assert str(path) not in maps.read_text()
        assert str(tmp_path / "model.safetensors") not in maps.read_text()


@both
def test_the_planner_reckons_with_the_bytes_that_are_there(kind: Quantized) -> None:
    """Of a slice of many blocks, estimate and memory differ by int8's scales and no more."""
    config = make_config("llama", hidden_size=64, intermediate_size=128)
    layout = find_layout(config, "causal-lm")
    work = Work(
        first=0,
        stop=BLOCKS,
        has_front=False,
        has_tail=False,
        ranks={},
        micro_batch=1,
        length=8,
        linear_bytes=LINEAR_BYTES[kind],
    )

    slice_ = Slice(config, "causal-lm", layout, torch.float32, CPU, kind)

    held = sum(p.nbytes for block in slice_.blocks for p in block.parameters())
    scales = sum(p.nbytes for n, p in slice_.model.named_parameters() if n.endswith(".scales"))
    estimated = estimate_memory(model_shape(config, "causal-lm", layout), work).base
    assert held - estimated == (scales if kind == "int8" else 0)


@both
def test_the_planner_counts_no_copies_of_quantised_weights(kind: Quantized) -> None:
    """In 16 bits a block keeps copies of float32 weights, and of quantised ones nothing."""
    config, layout = make_config("llama"), layout_of("llama")
    shape, part = model_shape(config, "causal-lm", layout), {"block.1": whole("llama")["block.1"]}

    kept = {base: bytes_kept(make_slice("llama", base, part)) for base in (None, kind)}
    planned = {
        base: estimate_memory(
            shape,
            Work(
                first=1,
                stop=2,
                has_front=False,
                has_tail=False,
                ranks={},
                micro_batch=2,
                length=8,
                linear_bytes=None if base is None else LINEAR_BYTES[base],
                compute_bytes=2,
            ),
        ).activations
        for base in (None, kind)
    }

    copies = 2 * sum(linear.num_weights for linear in shape.linears)
    assert kept[None] - kept[kind] == planned[None] - planned[kind] == copies


def bytes_kept(slice_: Slice) -> int:
    """Bytes that block 1 keeps of 2 x 8 tokens from its forward to its backward pass in 16 bits."""
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.zeros(2, 8, slice_.layout.width, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        autocast(torch.bfloat16, CPU),
    ):
        out = slice_.middle(hidden, torch.tensor([8, 7]), 1, 2)
    assert out.requires_grad
    own = {t.untyped_storage().data_ptr() for t in slice_.blocks[1].state_dict().values()}
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own)


# ---- training ------------------------------------------------------------------------------------


@cache
def known(family: str) -> Any:
    """What all runtimes of a family share."""
    config, task = make_config(family), task_of(family)
    layout = find_layout(config, task)
    return config, task, layout, whole(family), find_targets(config, task, layout, LORA)


def make_runtime(
    family: str, base: Base, split: int = BLOCKS, parts: Any = None, rank: int = 3
) -> TorchRuntime:
    """A device with blocks 0 .. split-1 and the tail."""
    config, task, layout, all_parts, shapes = known(family)
    names = ["front", *(f"block.{i}" for i in range(split)), "tail"]
    prefixes = tuple(f"{layout.blocks_path}.{i}." for i in range(split))
    ranks = {n: rank for n in shapes if n.startswith(prefixes)}
    plan = Plan(split=split, ranks=ranks, alphas={}, batch_size=4, micro_batch=4, tail=True)
    parts = {n: (parts or all_parts)[n] for n in names}
    training = TrainingConfig(learning_rate=1e-2)
    torch.manual_seed(0)  # PEFT draws the first factors
    return TorchRuntime(
        config, task, layout, parts, plan, LORA, training, 10, device="cpu", base=base
    )


def twin(family: str, kind: Quantized) -> TorchRuntime:
    """A float32 device whose base is what a quantised one computes with."""
    slice_ = make_slice(family, kind, known(family)[3])
    return make_runtime(family, "float32", parts=dense_parts(known(family)[3], slice_))


def train(runtime: TorchRuntime, family: str, which: range) -> list[float]:
    """Whole steps on the device alone; returns the losses."""
    losses = []
    for step in which:
        micro = make_micro(task_of(family), step)
        losses.append(runtime.local(micro, num_targets(micro), step, 0).loss_sum)
        runtime.step(step)
    return losses


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "int8"), ("gpt2", "int4"), ("bert", "int4")]
)
def test_adapters_learn_as_on_the_dense_weights(family: str, kind: Quantized) -> None:
    """Losses and factors are those of a float32 device with the dequantised weights."""
    runtime, dense = make_runtime(family, kind), twin(family, kind)

    losses, expected = (train(r, family, range(4)) for r in (runtime, dense))

    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    found, wanted = runtime.state.adapters.pairs(), dense.state.adapters.pairs()
    for name in wanted:
        assert np.linalg.norm(wanted[name].b_OR) > 0
        np.testing.assert_allclose(found[name].a_RI, wanted[name].a_RI, atol=1e-3)
        np.testing.assert_allclose(found[name].b_OR, wanted[name].b_OR, atol=1e-3)


@both
def test_a_cut_device_hands_on_what_the_whole_one_does(kind: Quantized) -> None:
    """Blocks on the device, tail behind them: hidden state and gradients are the whole model's."""
    whole_device = make_runtime("llama", kind)
    micro = make_micro("causal-lm", 0)
    sums = whole_device.local(micro, num_targets(micro), 0, 0)
    wanted = {n: p.grad for n, p in whole_device.state.adapters.parameters().items()}
    cut = make_runtime("llama", kind)

    top = cut.forward(micro, 0, 0)
    found, grad = cut.tail(top, micro, num_targets(micro))
    cut.backward(grad)

    assert found.loss_sum == pytest.approx(sums.loss_sum, rel=1e-6)
    for name, parameter in cut.state.adapters.parameters().items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-7)


@both
def test_a_residual_joins_a_weight_without_an_adapter(kind: Quantized) -> None:
    """A quantised weight of rank 0 takes part in the global update like any other."""
    runtime = make_runtime("gpt2", kind, rank=0)
    trained = make_runtime("gpt2", kind)
    train(trained, "gpt2", range(2))
    micro = make_micro("causal-lm", 5)

    runtime.state.set_residual(trained.state.adapters.products())

    np.testing.assert_allclose(runtime.forward_eval(micro), trained.forward_eval(micro), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@both
def test_adapters_leave_for_other_bases(kind: Quantized, tmp_path: Path) -> None:
    """What was trained here loads into a device of any base, and into PEFT on the float model."""
    trained = make_runtime("llama", kind)
    train(trained, "llama", range(2))
    other = make_runtime("llama", "float32")
    make_model(make_config("llama"), "causal-lm").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    source = ModelSource(str(tmp_path / "base"), "causal-lm")

    other.state.adapters.load_pairs(trained.state.adapters.pairs())
    difference = export_adapter(source, trained.state.adapters.products(), {}, tmp_path / "out")

    for name, pair in trained.state.adapters.pairs().items():
        assert np.array_equal(other.state.adapters.pairs()[name].b_OR, pair.b_OR)
    assert difference < 1e-5
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == set(trained.state.adapters.pairs())


@pytest.mark.parametrize(("family", "kind"), [("llama", "int4"), ("bert", "int8")])
def test_a_restored_device_goes_on_bit_for_bit(family: str, kind: Quantized) -> None:
    """Two steps, saved, loaded into a fresh device and two more: as four in one go."""
    straight, stopped = make_runtime(family, kind), make_runtime(family, kind)
    for runtime in (straight, stopped):
        runtime.state.begin_round()
        train(runtime, family, range(2))
    restored = make_runtime(family, kind)

    restored.state.restore(
        {name: value.copy() for name, value in stopped.state.checkpoint().items()}
    )

    assert train(straight, family, range(2, 4)) == train(restored, family, range(2, 4))
    first, second = straight.state.checkpoint(), restored.state.checkpoint()
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["free", "reference", "signed"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "int8"), ("gpt2", "int4")])
def test_importance_is_that_of_the_dense_weights(family: str, form: Form, kind: Quantized) -> None:
    """Every form measures on a quantised base what it measures on its dequantised weights."""
    found = []
    for runtime in (make_runtime(family, kind), twin(family, kind)):
        runtime.state.meter.measure(form, 1)
        train(runtime, family, range(1))
        found.append(runtime.state.meter.take())

    assert all(value > 0 for value in found[0].values())
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_device_of_a_run_quantises_what_it_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`base` of the config decides, one device at a time; the coordinator's parts are the same."""
    made: list[Slice] = []

    class Noted(Slice):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("edge_sdk.runtime.torch_runtime.Slice", Noted)
    cluster = Cluster(tmp_path, save_model("llama", tmp_path / "m"), tmp_path / "parts", ("a", "b"))
    serving = cluster.serve().start()
    clients = [*cluster.start("a", base="int4"), *cluster.start("b")]

    assert serving.wait() == "completed"

    wait_all(clients)
    kinds = [{type(m).__name__ for m in layers_of(slice_).values()} for slice_ in made]
    assert sorted(kinds, key=len) == [set(), {"QuantizedLinear"}]
    assert serving.rows[-1]["train_loss"] < serving.rows[1]["train_loss"]


# ---- configuration -------------------------------------------------------------------------------


def test_a_base_that_does_not_exist_is_one_clear_line() -> None:
    """The field, the value and what is allowed."""
    needed = ["coordinator=tcp://127.0.0.1:1", "server_key=k"]

    with pytest.raises(ConfigError) as caught:
        load_config(ClientConfig, overrides=[*needed, "base=int3"], env={})

    (line,) = str(caught.value).splitlines()
    assert "base" in line
    assert "int3" in line
    assert all(name in line for name in ("float32", "bfloat16", "float16", "int8", "int4"))
    assert load_config(ClientConfig, overrides=[*needed, "base=int4"], env={}).base == "int4"


def test_a_base_in_half_precision_needs_products_in_it() -> None:
    """16-bit weights do not multiply with float32 activations: said in one line, with the cure."""
    with pytest.raises(ConfigError, match=r"^base: bfloat16 weights .* set compute to bfloat16"):
        make_runtime("llama", "bfloat16")
