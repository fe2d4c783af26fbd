"""Graphs for devices without torch: made in a process of their own, and kept for ever.

Making them takes seconds of Python and changes torch's modules meanwhile, so that it cannot happen
beside a computation. What is made is known by all that it depends on and is never made twice.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.onnx_export.job import ExportJob, job_text
from edge_sdk.errors import RefusedError, one_line
from edge_sdk.files import atomic_write
from edge_sdk.lora.targets import LoraConfig, ModelFacts
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.weights import ModelSource
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.runtime.onnx_graphs import PART_NAME

if TYPE_CHECKING:
    from edge_sdk.model.layout import Layout

log = logging.getLogger(__name__)

MODULE = "coordinator.onnx_export.export"
# Whatever changes the graphs of an unchanged model: packages, and files of ours.
MAKERS = ("torch", "transformers", "onnx")
ROOT = Path(__file__).parents[2]
SOURCES = (
    "coordinator/onnx_export/*.py",
    "edge_sdk/lora/targets.py",
    "edge_sdk/runtime/onnx_graphs.py",
    "edge_sdk/model/layout.py",
    "edge_sdk/model/partition.py",
    "edge_sdk/model/weightless.py",
)


@dataclass
class Build:
    """Graphs that are being made."""

    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]

    @property
    def path(self) -> Path:
        """File in which they will lie."""
        return Path(self.folder.name) / "graphs.safetensors"

    def error(self) -> str:
        """Return what the process said last."""
        lines = (Path(self.folder.name) / "stderr").read_text("utf-8", "replace").split("\n")
        said = [line for line in lines if line.strip()]
        return said[-1] if said else f"exit code {self.process.returncode}"


class GraphCache:
    """Graphs of one model, by plan.

    Args:
        source: The model.
        facts: Its blocks and targets.
        num_labels: Classes of a classifier; 0 for a causal LM.
        cache: Where finished graphs are kept.
    """

    def __init__(
        self, source: ModelSource, facts: ModelFacts, num_labels: int, cache: PartCache
    ) -> None:
        self._source, self._facts, self._num_labels = source, facts, num_labels
        self._cache = cache
        self._keys: dict[tuple[int, bool, bool], str] = {}
        self._builds: dict[str, Build] = {}

    def find(self, plan: Plan, *, measures: bool) -> Part | None:
        """Return the graphs of *plan*; None while they are being made.

        Raises:
            RefusedError: they cannot be made; the message says why.
        """
        what = (plan.split, plan.tail, measures)
        if what not in self._keys:
            self._keys[what] = self._key(self._job(plan, measures=measures))
        key = self._keys[what]
        if part := self._cached(key):
            return part
        if key not in self._builds:
            self._builds[key] = self._begin(self._job(plan, measures=measures))
            log.info("graphs.ordered split=%d", plan.split)
        build = self._builds[key]
        if build.process.poll() is None:
            return None
        del self._builds[key]
        with build.folder:
            if build.process.returncode:
                raise RefusedError(
                    f"no graphs for its onnxruntime backend: {build.error()}; install torch there"
                )
            return self._store(key, build.path.read_bytes())

    def close(self) -> None:
        """Stop what is being made."""
        for build in self._builds.values():
            build.process.kill()
            build.process.wait()
            build.folder.cleanup()
        self._builds = {}

    def _job(self, plan: Plan, *, measures: bool) -> ExportJob:
        names = ["front", *(f"block.{i}" for i in range(plan.split)), *(["tail"] * plan.tail)]
        stored = {n: t for name in names for n, t in self._source.tensors(name).items()}
        return ExportJob(
            task=self._source.task,
            num_labels=self._num_labels,
            split=plan.split,
            tail=plan.tail,
            measures=measures,
            targets={n: tuple(self._facts.targets[n]) for n in self._facts.weights(0, plan.split)},
            dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in stored.items()},
        )

    def _key(self, job: ExportJob) -> str:
        versions = {**{name: _version(name) for name in MAKERS}, "ours": _sources()}
        config = self._source.config.to_json_string()
        text = json.dumps([asdict(job), versions, config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _index(self, key: str) -> Path:
        return self._cache.folder / f"{key}.graphs.json"

    def _cached(self, key: str) -> Part | None:
        path = self._index(key)
        if not path.is_file():
            return None
        try:
            part = Part(name=PART_NAME, **json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:  # as a power cut may have left it
            log.warning("graphs.damaged file=%s reason=%s; made again", path, one_line(error))
            return None
        return part if self._cache.has(part) else None

    def _store(self, key: str, data: bytes) -> Part:
        sha256 = hashlib.sha256(data).hexdigest()
        part = Part(name=PART_NAME, sha256=sha256, num_bytes=len(data))
        self._cache.store(part, data)
        facts = {"sha256": part.sha256, "num_bytes": part.num_bytes}
        atomic_write(self._index(key), json.dumps(facts), mode=0o666, sync=False)
        return part

    def _begin(self, job: ExportJob) -> Build:
        folder = tempfile.TemporaryDirectory(prefix="edgesplit-graphs-")
        base = Path(folder.name)
        (base / "job.json").write_text(job_text(job), "utf-8")
        # The process finds this package wherever we were imported from, in any working directory.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        arguments = [base / "job.json", self._source.folder, base / "graphs.safetensors"]
        with (base / "stderr").open("wb") as errors:
            command = [sys.executable, "-m", MODULE, *map(str, arguments)]
            process = subprocess.Popen(command, stdout=errors, stderr=errors, env=env)
        return Build(process, folder)


def check_experts(facts: ModelFacts, split: int) -> None:
    """Refuse a device without torch if experts are adapted in its blocks 0 .. split-1.

    Raises:
        RefusedError: experts are adapted there.
    """
    stacked = [n for n in facts.weights(0, split) if facts.targets[n].num_experts]
    if stacked:
        raise RefusedError(
            f"adapters on experts ({stacked[0]}, ...) are not possible with the onnxruntime "
            "backend; set lora.experts to false, or install torch on this device"
        )


def check_lora(lora: LoraConfig) -> None:
    """Refuse a device whose backend cannot do what the run asks for.

    Raises:
        RefusedError: the run uses dropout.
    """
    if lora.lora_dropout:
        raise RefusedError(
            f"lora.lora_dropout: {lora.lora_dropout} is not possible with the onnxruntime backend, "
            "which draws no random numbers; set it to 0, or install torch on this device"
        )


def check_layout(layout: Layout) -> None:
    """Refuse a device whose graphs would lack what its blocks get beside the hidden state.

    Raises:
        RefusedError: the message says what that is.
    """
    more = "the token ids" if layout.needs_ids else "a tensor of the embeddings' side"
    if layout.shared:
        more = "what an earlier block has kept"
    if layout.shared or layout.needs_ids or layout.late:
        raise RefusedError(
            f"blocks of this model read {more} beside the hidden state, for which the onnxruntime "
            "backend has no graphs; install torch on this device"
        )


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in ROOT.glob(name)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
