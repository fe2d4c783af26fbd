"""A residual inside a frozen weight is made of W_0 and of nothing that was there before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.lora.adapters import Adapters
from edge_sdk.lora.factors import Factors, zero_like
from edge_sdk.lora.folding import folds, has_room
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.partition import Slice
from edge_sdk.model.safetensors_files import open_files
from profiler.sensors.memory import drop_mapped, field_bytes
from tests.edge_sdk.lora.measured import known, warm_factors
from tests.tiny import make_parts, task_of

MIB = 2**20


def folded(family: str, dtype: torch.dtype = torch.float32) -> tuple[Slice, Adapters, Any]:
    """A whole tiny model that folds, and the tensors that it was given."""
    k = known(family)
    slice_ = Slice(k.config, k.task, k.layout, dtype)
    parts = make_parts(k.model, k.layout, list(k.layout.part_names()))
    for name, tensors in parts.items():
        slice_.add(name, tensors)
    return slice_, Adapters(slice_, k.ranks, {}, LoraConfig(), folds=True), parts


def weights(slice_: Slice, family: str) -> dict[str, torch.Tensor]:
    """Copies of what all adapted weights are now."""
    layers = ((name, slice_.model.get_submodule(name)) for name in known(family).shapes)
    return {n: getattr(m, "base_layer", m).weight.detach().clone() for n, m in layers}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounds_leave_nothing_behind(family: str) -> None:
    """After other residuals a weight has the bits that it has at once, and without any W_0's."""
    k = known(family)
    first = {n: warm_factors(n, s) for n, s in k.shapes.items()}
    other = {n: f.scaled(1000.0) for n, f in first.items()}
    slice_, adapters, parts = folded(family)
    before = weights(slice_, family)
    given = {n: t.clone() for tensors in parts.values() for n, t in tensors.items()}

    adapters.set_residual(first)
    once = weights(slice_, family)
    for residual in (other, first):
        adapters.set_residual(residual)
    again = weights(slice_, family)
    adapters.set_residual({n: zero_like(f) for n, f in first.items()})
    after = weights(slice_, family)

    assert all(torch.equal(again[n], once[n]) and not torch.equal(once[n], before[n]) for n in once)
    assert all(torch.equal(after[n], before[n]) for n in before)
    held = {n: t for tensors in parts.values() for n, t in tensors.items()}
    assert all(torch.equal(held[n], value) for n, value in given.items())


def test_no_layer_stands_beside_a_folded_weight() -> None:
    """A step runs what it would run without any residual: the adapters of one's own."""
    k = known("llama")
    slice_, adapters, _ = folded("llama")
    modules = {name for name, _ in slice_.model.named_modules()}

    adapters.set_residual({n: warm_factors(n, s) for n, s in k.shapes.items()})

    assert {name for name, _ in slice_.model.named_modules()} == modules
    assert adapters.folded.keys() == k.shapes.keys()


def test_a_half_base_is_rounded_once() -> None:
    """A weight in bfloat16 is the float32 sum, rounded, however many rounds there were."""
    k = known("llama")
    slice_, adapters, parts = folded("llama", torch.bfloat16)
    residual = {n: warm_factors(n, s) for n, s in k.shapes.items()}
    stored = {n: t for tensors in parts.values() for n, t in tensors.items()}

    for scale in (3.0, 1.0):
        adapters.set_residual({n: f.scaled(scale) for n, f in residual.items()})

    for name, found in weights(slice_, "llama").items():
        due = stored[f"{name}.weight"] + torch.from_numpy(residual[name].dense())
        torch.testing.assert_close(found, due.bfloat16(), rtol=2**-8, atol=0)


def test_a_budget_computes_with_the_best_ranks_and_keeps_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beside a quantised weight stands the nearest of so few ranks, and the log tells its error."""
    k = known("llama")
    name = next(n for n in k.shapes if k.ranks[n])
    slice_ = Slice(k.config, k.task, k.layout, torch.float32, quantized="int8")
    for part, tensors in make_parts(k.model, k.layout, list(k.layout.part_names())).items():
        slice_.add(part, tensors)
    adapters = Adapters(slice_, k.ranks, {}, LoraConfig(), most_beside=1)
    residual = warm_factors(name, k.shapes[name])
    u, sigma, v = np.linalg.svd(residual.dense(), full_matrices=False)

    with caplog.at_level("INFO"):
        adapters.set_residual({name: residual})

    layer: Any = slice_.model.get_submodule(name)
    found = layer.lora_B["residual"].weight @ layer.lora_A["residual"].weight
    due = sigma[0] * np.outer(u[:, 0], v[0])
    np.testing.assert_allclose(found.detach().numpy(), due, atol=1e-6)
    assert adapters.residual[name] is residual
    error = float(sigma[1] / np.linalg.norm(sigma))
    assert f"residual.cut ranks=1 worst={name} error={error:.3g}" in caplog.text


def test_what_is_folded() -> None:
    """Every dense weight that has the memory, unless told otherwise; quantised weights never."""
    assert folds("auto", is_quantized=False)
    assert folds("folded", is_quantized=False)
    assert not folds("low-rank", is_quantized=False)
    assert not folds("folded", is_quantized=True)
    assert has_room(100, 200.0)
    assert has_room(100, None)
    assert not has_room(100, 100.0)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="tells no mappings")
def test_a_mapped_weight_does_not_stay_in_memory_twice(tmp_path: Path) -> None:
    """Pages of a file that were read go, and come back the same; other memory stays as it is."""
    from safetensors.torch import save_file

    path, status = tmp_path / "part.safetensors", Path("/proc/self/status")
    save_file({"w": torch.arange(4 * MIB, dtype=torch.float32)}, path)
    mapped = open_files([path], is_streamed=False)["w"]
    own = np.ones(4 * MIB, np.float32)
    total = float(mapped.sum())
    before = field_bytes(status, "RssFile")

    assert drop_mapped(mapped.data_ptr(), mapped.numel() * 4)
    assert not drop_mapped(own.ctypes.data, own.nbytes)

    after = field_bytes(status, "RssFile")
    assert before is not None
    assert after is not None
    assert before - after > 15 * MIB
    assert own.sum() == 4 * MIB
    assert float(mapped.sum()) == total


def test_a_slice_on_a_file_writes_to_no_file(tmp_path: Path) -> None:
    """What is folded is memory of its own: the file, and who else has mapped it, keep W_0."""
    from safetensors.torch import save_file

    k = known("llama")
    name = next(iter(k.shapes))
    parts = make_parts(k.model, k.layout, ["block.0"])
    path = tmp_path / "block.safetensors"
    save_file(parts["block.0"], path)
    mapped = open_files([path], is_streamed=False)
    slice_ = Slice(k.config, task_of("llama"), k.layout, torch.float32)
    slice_.add("block.0", mapped)
    adapters = Adapters(slice_, {name: 2}, {}, LoraConfig(), folds=True)
    bits = path.read_bytes()

    adapters.set_residual({name: Factors(*warm_factors(name, k.shapes[name]))})

    assert path.read_bytes() == bits
    assert torch.equal(mapped[f"{name}.weight"], parts["block.0"][f"{name}.weight"])
    found = slice_.model.get_submodule(name).base_layer.weight
    assert not torch.equal(found, mapped[f"{name}.weight"])  # type: ignore[arg-type]
