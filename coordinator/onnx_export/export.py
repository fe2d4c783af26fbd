"""Make the graphs that a device without torch runs, from a model's config alone.

    python -m coordinator.onnx_export.export JOB.json MODEL_FOLDER OUT

Every block is traced, and equal ones are kept once. Takes seconds of Python for each kind of block,
and changes torch's modules while it does: a coordinator runs it as a process of its own
(`cache.py`). Reads no weights.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coordinator.onnx_export.job import ExportJob, load_job
from coordinator.onnx_export.operators import LOWERINGS
from coordinator.onnx_export.slice_graphs import Tracer
from coordinator.onnx_export.trace import Traced
from coordinator.onnx_export.writer import Writer
from edge_sdk.errors import EdgeError, one_line
from edge_sdk.files import atomic_write
from edge_sdk.lora.targets import Shape
from edge_sdk.model.layout import Layout, find_layout, is_transposed
from edge_sdk.model.partition import Slice, head_names
from edge_sdk.model.weights import load_config
from edge_sdk.runtime.onnx_graphs import FOLDED, TRANSPOSED, About, Graphs


def export_slice(config: Any, job: ExportJob, layout: Layout | None = None) -> Graphs:
    """Return the graphs of *job* for the model of *config*.

    Raises:
        ModelError: the model's code cannot be traced, or uses an operator that has no translation.
    """
    layout = layout or find_layout(config, job.task)
    slice_ = _weightless(config, job, layout)
    head = head_names(slice_)
    targets = {name: Shape(*shape) for name, shape in job.targets.items()}
    # A head that is trained is float32, whatever it was stored as.
    dtypes = {n: getattr(torch, d) for n, d in job.dtypes.items() if n not in head}
    tracer = Tracer(slice_, targets, dtypes)
    models = {"front": _written(tracer.front)}
    kinds: list[int] = []
    known: dict[bytes, int] = {}
    for index in range(job.split):
        block = _written(partial(tracer.block, index))
        kind = known.setdefault(block, len(known))
        kinds.append(kind)
        if f"block.{kind}" not in models:
            folded = _written(partial(tracer.block, index, folded=True))
            models |= {f"block.{kind}": block, f"{FOLDED}block.{kind}": folded}
            models |= _gradients(tracer, index, kind, job)
    if job.tail:
        models["tail"] = _written(tracer.tail)
    transposed = sorted(n for n in targets if is_transposed(slice_.model.get_submodule(n)))
    models[TRANSPOSED] = json.dumps(transposed).encode()
    about = About(
        blocks_path=layout.blocks_path,
        kinds=tuple(kinds),
        task=job.task,
        head=head if job.tail else (),
    )
    return Graphs(about, models)


def _gradients(tracer: Tracer, index: int, kind: int, job: ExportJob) -> dict[str, bytes]:
    models = {}
    for prefix, folded in (("", False), (FOLDED, True)):
        vjp = partial(tracer.block_vjp, index, folded=folded)
        models[f"{prefix}vjp.{kind}"] = _written(vjp)
        if job.measures:
            models[f"{prefix}measure.{kind}"] = _written(partial(vjp, measures=True))
    return models


def _weightless(config: Any, job: ExportJob, layout: Layout) -> Slice:
    """Return the slice with a single zero for all its weights."""
    slice_ = Slice(config, job.task, layout, torch.float32)
    shapes = {name: tensor.shape for name, tensor in slice_.model.state_dict().items()}
    for index in range(job.split):
        zeros = {n: torch.zeros(()).expand(shapes[n]) for n in layout.blocks[index]}
        slice_.add(f"block.{index}", zeros)
    return slice_


def _written(trace: Callable[[], Traced]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        return Writer(trace(), LOWERINGS).write()


def main() -> int:
    """Export the job of argument 1, for the model in the folder of argument 2, to argument 3."""
    job_path, folder, out = map(Path, sys.argv[1:4])
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    try:
        job = load_job(job_path)
        config = load_config(folder, job.num_labels)
        atomic_write(out, export_slice(config, job).pack(), sync=False)
    except EdgeError as error:
        sys.stderr.write(f"{one_line(error)}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
