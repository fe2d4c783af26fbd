"""Graphs hold what the model's own code computes, for every family, whatever the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from coordinator.onnx_export.export import export_slice
from coordinator.onnx_export.job import ExportJob, job_text, load_job
from coordinator.onnx_export.operators import LOWERINGS
from coordinator.onnx_export.slice_graphs import Tracer
from coordinator.onnx_export.trace import Input, Traced, trace
from coordinator.onnx_export.writer import Writer
from edge_sdk.errors import ModelError
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.runtime.onnx_sizes import Sizes, check_room
from tests.tiny import make_config, make_model, make_parts, task_of

# Those that the conformance suite of the backends does not run.
FAMILIES = ("qwen3", "roberta", "gemma3_text", "opt", "gpt_neox", "phi", "modernbert")
BLOCK = 1
TOLERANCE = 1e-5


def tracer(family: str) -> Tracer:
    """A tracer over a tiny model with weights."""
    config, task = make_config(family), task_of(family)
    layout = find_layout(config, task)
    slice_ = Slice(config, task, layout, torch.float32)
    for name, tensors in make_parts(make_model(config, task), layout, [f"block.{BLOCK}"]).items():
        slice_.add(name, tensors)
    return Tracer(slice_, find_targets(config, task, layout, LoraConfig()), {})


def run(traced: Traced, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What onnxruntime makes of a graph."""
    return run_model(Writer(traced, LOWERINGS).write(), values, traced.outputs)


def run_model(
    model: bytes, values: dict[str, np.ndarray], wanted: Sequence[str]
) -> list[np.ndarray]:
    """What onnxruntime makes of a model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options)
    found: list[np.ndarray] = session.run(
        list(wanted), {i.name: values[i.name] for i in session.get_inputs()}
    )
    return found


def random_inputs(traced: Traced, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Numbers for every input; the last row is the shortest, and every rank is another one."""
    draw = np.random.default_rng(seed)
    sizes = {"B": rows, "T": length, "N": length}
    found: dict[str, np.ndarray] = {}
    for name, entry in traced.inputs.items():
        rank = 1 + len(name.rpartition(".")[0]) % 3 + name.endswith((".V", ".U"))
        shape = [sizes.get(n, rank) if isinstance(n, str) else n for n in entry.shape]
        found[name] = draw.normal(0, 0.3, shape).astype(np.float32)
    found["lengths"] = np.linspace(length, max(1, length - rows), rows).astype(np.int64)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_its_gradients_are_those_of_the_model(family: str) -> None:
    """One graph for all batches and lengths; padding, sliding windows and ranks included."""
    made = tracer(family)
    traced = made.block_vjp(BLOCK)
    model = Writer(traced, LOWERINGS).write()
    check_room({"vjp.0": model}, Sizes(B=8, T=64, N=128, R=8), 4e6)  # a device takes it
    compare_with_torch(made, traced, model)


def compare_with_torch(made: Tracer, traced: Traced, model: bytes) -> None:
    """All gradients that *traced* names, by *model* and by autograd."""
    names = list(traced.inputs)
    for rows, length in ((3, 9), (1, 1), (2, 17)):
        values = random_inputs(traced, rows, length, seed=rows)
        tensors = {n: torch.from_numpy(values[n]) for n in names}
        leaves = [o.removeprefix("grad:") for o in traced.outputs]
        for name in leaves:
            tensors[name].requires_grad_(True)
        out = made._block(BLOCK, tensors, {}, folded=False)
        wanted = torch.autograd.grad(out, [tensors[n] for n in leaves], tensors["grad"])

        own = run_model(model, values, traced.outputs)
        for grad, found in zip(wanted, own, strict=True):
            assert found.shape == tuple(grad.shape)
            assert np.abs(found - grad.numpy()).max() <= TOLERANCE * max(1.0, grad.abs().max())


def test_what_decides_by_values_is_refused() -> None:
    """A mixture of experts cannot be traced: one line says so, and why."""
    config, task = make_config("qwen2_moe"), task_of("qwen2_moe")
    job = ExportJob(
        task=task, num_labels=0, split=1, tail=False, measures=False, targets={}, dtypes={}
    )
    with pytest.raises(ModelError, match="cannot be traced for onnxruntime") as caught:
        export_slice(config, job)
    assert "\n" not in str(caught.value)


def test_an_operator_without_a_translation_is_named() -> None:
    """Nothing is left out in silence."""
    traced = trace(lambda v: (torch.erfinv(v["x"]),), {"x": Input(("B", 3))}, ("y",))

    with pytest.raises(ModelError, match="no translation of the model's operator 'erfinv.default'"):
        Writer(traced, LOWERINGS).write()


def test_code_that_fixes_a_size_is_refused() -> None:
    """A graph for one batch size only would fail on the next."""

    def fixing(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (values["x"].reshape(3, 3),)

    with pytest.raises(ModelError, match="fixes size B of 'x' to 3"):
        trace(fixing, {"x": Input(("B", 3))}, ("y",))


@pytest.mark.parametrize("limit", [5, 40])
def test_code_that_decides_by_a_size_is_refused(limit: int) -> None:
    """A window that is handled only where a sequence is longer than it would be left out, or in."""

    def deciding(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x = values["x"]
        return (x * 2 if x.shape[1] > limit else x,)

    with pytest.raises(ModelError, match="the model's code asks whether"):
        trace(deciding, {"x": Input(("B", "T"))}, ("y",), largest=64)


def test_nothing_is_computed_from_a_rank() -> None:
    """All ranks share a letter while tracing: a size made of one would be another's."""
    traced = trace(
        lambda v: (v["x"].reshape(-1, 2) * v["x"].shape[0],), {"x": Input(("R", 4))}, ("y",)
    )
    with pytest.raises(ModelError, match="no translation of the size"):
        Writer(traced, LOWERINGS).write()


CASES: dict[str, Any] = {
    "alpha": lambda x: (torch.add(x, x, alpha=3), torch.sub(x, 1, alpha=2), 2 - x),
    "compare": lambda x: (x > 0.1, x.ne(0), (x < 0) & (x > -1), x.long() * 2.5),
    "powers": lambda x: (x**2, x**3, (x * x) ** 0.5, (x * x + 1) ** -1.5),
    "slices": lambda x: (x[..., 1:-1], x[:, ::2], x[..., -1], x[0]),
    "joins": lambda x: (torch.stack([x, x], 1), torch.cat([x, x.long()], -1), x.repeat(2, 1, 3)),
    "splits": lambda x: (*x.split(3, -1), *x.chunk(2, -1), *x.unbind(-1)),
    "sums": lambda x: (
        x.sum(),
        x.mean((0, 2), keepdim=True),
        x.amax(-1),
        x.cumsum(1),
        x.argmax(-1),
    ),
    "fills": lambda x: (torch.full_like(x, 2), x.new_full((2, x.shape[0]), 1.5), x.new_ones(2)),
    "masks": lambda x: (x.masked_fill(x > 0, -1.0), torch.where(x > 0, x, 0.0)),
    "ranges": lambda x: (torch.arange(x.shape[1]), torch.arange(1, 9, 2), torch.arange(4.0)),
    "activations": lambda x: tuple(
        f(x)
        for f in (torch.sigmoid, torch.nn.functional.silu, torch.relu, torch.nn.functional.gelu)
    ),
    "norm": lambda x: (torch.nn.functional.layer_norm(x, (8,)), x.softmax(-1), x.log_softmax(1)),
    "squeezes": lambda x: (x[None].squeeze(0), x.unsqueeze(-1).squeeze(-1), x.squeeze(1)),
    "lookups": lambda x: (x.gather(1, (x > 0).long()), x.index_select(2, torch.tensor([3, 0]))),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_means_in_onnx_what_it_means_in_torch(case: str) -> None:
    """Values, dtypes and shapes, at another size than was traced."""
    traced = trace(lambda v: tuple(CASES[case](v["x"])), {"x": Input(("B", "T", 8))}, NAMES[case])
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)

    wanted, found = CASES[case](torch.from_numpy(x)), run(traced, {"x": x})

    for tensor, array in zip(wanted, found, strict=True):
        assert array.dtype == tensor.numpy().dtype
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-5, atol=1e-6)


NAMES = {
    name: tuple(f"y{i}" for i in range(len(case(torch.ones(3, 11, 8)))))
    for name, case in CASES.items()
}


def test_gradients_of_stretches_are_padded() -> None:
    """Slices and selections, from either end."""

    def run_both(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x = values["x"].detach().requires_grad_(True)
        return torch.autograd.grad((x[..., 1:3] * 2).sum() + (x[:, -1] * x[:, 0]).sum(), [x])

    traced = trace(run_both, {"x": Input(("B", "T", 4))}, ("y",))
    x = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)

    (wanted,) = run_both({"x": torch.from_numpy(x)})
    np.testing.assert_allclose(run(traced, {"x": x})[0], wanted.numpy())


def test_a_trace_gives_the_same_bytes_again() -> None:
    """Graphs are known by their hash, in every run."""
    made = tracer("gpt_neox")
    first, second = (Writer(made.block(BLOCK), LOWERINGS).write() for _ in range(2))

    assert first == second


def test_a_job_survives_the_journey(tmp_path: Path) -> None:
    """What the other process reads is what was written."""
    job = ExportJob(
        task="causal-lm",
        num_labels=0,
        split=3,
        tail=True,
        measures=False,
        targets={"a": (3, 4)},
        dtypes={"a.weight": "bfloat16"},
    )
    path = tmp_path / "job.json"
    path.write_text(job_text(job))

    assert job_text(load_job(path)) == job_text(job)
