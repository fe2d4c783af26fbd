"""The model that a coordinator serves: its parts for the devices, its blocks for the engine.

It knows no network and no rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any

from coordinator.config.run import ServeConfig
from coordinator.engine.blocks import base_of
from coordinator.engine.interface import Engine, EngineMaker, EngineSpec
from coordinator.onnx_export.cache import GraphCache, check_experts, check_layout, check_lora
from coordinator.planning.fixed import check_config, plan_server
from coordinator.planning.problem import PlanningProblem, ServerProfile, planning_length
from edge_sdk.client.profile import block_speed
from edge_sdk.data.batches import MicroBatch, eval_batches
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.tokenize import ModelLimits, check_tokenizer, tokenize_rows
from edge_sdk.errors import ConfigError, ModelError, RemoteProtocolError, StorageError
from edge_sdk.lora.targets import (
    Coverage,
    LoraConfig,
    ModelFacts,
    coverage,
    find_targets,
)
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.kept.part_hashes import PartHashes
from edge_sdk.model.kept.split_proof import prove_split, prove_weights
from edge_sdk.model.layout import usable_positions
from edge_sdk.model.precision import compute_name
from edge_sdk.model.weights import ModelSource, load_tokenizer, model_hash
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.runtime.torch_runtime import pick_device
from profiler.estimate.sizes import ModelShape
from profiler.sensors.memory import return_freed

log = logging.getLogger(__name__)

ENGINES = {
    "local": "coordinator.engine.local:local_engines",
    "ray": "coordinator.engine.ray.engine:ray_engines",
}
"""Where each kind of engine stands: what takes the config of a run, and has a maker of engines
while the run lasts. What it needs is imported when it is asked for."""


def engines(config: ServeConfig) -> AbstractContextManager[EngineMaker]:
    """Return what makes the engines that a run asks for; on leaving it, they are gone.

    Raises:
        ConfigError: what they need is missing; on entering it.
    """
    module, _, function = ENGINES[config.engine.kind].partition(":")
    found: AbstractContextManager[EngineMaker] = getattr(import_module(module), function)(config)
    return found


class ServerModel:
    """A model on the coordinator's disk.

    Raises:
        ModelError: it is missing, unreadable, has no list of blocks, or computes something else
            when it is cut between them.
        ConfigError: the config asks for what it cannot do.
        DataError: the evaluation file is malformed.
    """

    def __init__(
        self,
        config: ServeConfig,
        cache: PartCache | None = None,
        make_engine: EngineMaker | None = None,
    ) -> None:
        self._config, self._make_engine = config, make_engine or _make_local
        base_of(config)  # refused before anything is read
        num_labels = len(config.label_names)
        self.source = ModelSource(
            config.model, config.task, num_labels=num_labels, revision=config.revision
        )
        self._cache = cache or PartCache()
        is_split = config.trained_by == "devices"
        if is_split:
            prove_split(self.source.config, config.task, self._cache.folder)
        self.source.load_whole(config.training.seed)
        lora: LoraConfig = config.lora
        layout = self.source.layout
        self._check_tokenizer()
        self.facts = ModelFacts(layout, find_targets(self.source.config, config.task, layout, lora))
        self.first = check_config(config, self.facts)
        self._limits = self._find_limits()
        evaluation = config.evaluation
        self.eval_batches = self._load(evaluation.data)
        self.test_batches = self._load(replace(evaluation.data, path=evaluation.test_file))
        """What the result is evaluated on, once."""
        hashes = PartHashes(self.source, self._cache.folder)
        self.parts = {name: hashes.describe(name) for name in self.source.part_names()}
        self._forget_hashes = hashes.forget
        self._by_hash = {part.sha256: part for part in self.parts.values()}
        self.graphs = GraphCache(self.source, self.facts, num_labels, self._cache)
        self.hash = model_hash(self.parts)
        if is_split:
            prove_weights(self.source, self.hash, self._cache.folder)
        return_freed()

    @property
    def needs_ids(self) -> bool:
        """Whether devices must send the token ids of their texts, which later blocks need."""
        layout = self.source.layout
        return layout.needs_ids and self.first < layout.num_blocks

    @property
    def text_config(self) -> Any:
        """The part of the model's config that speaks of tokens and blocks."""
        return self.source.config.get_text_config()

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that this run takes."""
        assert self._limits.max_positions is not None
        return self._limits.max_positions

    def _find_limits(self) -> ModelLimits:
        usable = usable_positions(self.source.config, self._config.task)
        wanted = self._config.max_length or usable
        if wanted > usable or wanted < 2:
            raise ConfigError(
                f"max_length: {wanted} is outside 2..{usable} (the model's positions)"
            )
        return ModelLimits(
            vocab_size=self.text_config.vocab_size,
            max_positions=wanted,
            num_labels=len(self._config.label_names) or None,
            label_names=self._config.label_names,
        )

    @cached_property
    def shape(self) -> ModelShape:
        """The model's sizes, for estimates."""
        from edge_sdk.model.shape import model_shape

        return model_shape(self.source.config, self._config.task, self.facts.layout)

    @cached_property
    def coverage(self) -> Coverage:
        """How much of the model's blocks has adapters."""
        facts = self.facts
        return coverage(self.source.config, self._config.task, facts.layout, facts.targets)

    def planning_problem(self) -> PlanningProblem | None:
        """Return what is to be planned before any device has come; None where that is nothing."""
        planning = self._config.planning
        if planning.split == planning.ranks == "fixed":
            return None
        found = self.problem()
        if found.split_rule.weighs_time and found.server_speed is None:
            server = replace(found.server, flops_per_s=self.measured_speed())
            return replace(found, server=server)
        return found

    def problem(self) -> PlanningProblem:
        """Return what plans are made from while no device is known."""
        config = self._config
        return PlanningProblem(
            config=config,
            facts=self.facts,
            model=self.shape,
            profiles={},
            server=ServerProfile.here(config),
            length=planning_length(config, self.max_length),
        )

    def measured_speed(self) -> float | None:
        """Measure a block's operations a second on the coordinator, as a device does."""
        device = pick_device(self._config.device)
        compute = compute_name(self._config.compute, device)
        return block_speed(self.source.folder, device.type, compute, self.max_length)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.source.folder)

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer that does not fit now, before each device does."""
        rows, tokens = self.text_config.vocab_size, len(self.tokenizer)
        if tokens > rows:
            raise ModelError(
                f"{self.source.folder}: the tokenizer knows {tokens} tokens, the model {rows}; "
                "they do not belong together"
            )
        check_tokenizer(self.tokenizer, rows)
        pad_id, own = self.text_config.pad_token_id, self.tokenizer.pad_token_id
        if self._config.task == "sequence-classification" and own not in (None, pad_id):
            log.warning(
                "model.padding model=%s tokenizer=%s effect=a decoder pools by the model's: pad "
                "with that where several texts are given to the result at once",
                pad_id,
                own,
            )

    def _load(self, data: DataConfig) -> list[MicroBatch]:
        """Return a file of ours as tokens; nothing where *data* names none."""
        if data.path is None:
            return []
        examples = tokenize_rows(load_rows(None, data), self.tokenizer, data, self._limits)
        pad_id, size = self.text_config.pad_token_id or 0, self._config.evaluation.batch_size
        return list(eval_batches(examples, size, pad_id=pad_id))

    # ---- parts ----

    def parts_for(self, plan: Plan) -> tuple[Part, ...]:
        """Return the parts that a device needs for *plan*."""
        names = ["front", *(f"block.{i}" for i in range(plan.split)), *(["tail"] * plan.tail)]
        return tuple(self.parts[name] for name in names)

    def graphs_for(self, plan: Plan) -> Part | None:
        """Return the graphs that a device without torch needs; None while they are being made.

        Raises:
            RefusedError: they cannot be made, or the run does what they cannot.
        """
        check_lora(self._config.lora)
        check_experts(self.facts, plan.split)
        check_layout(self.facts.layout)
        part = self.graphs.find(plan, measures=self._config.planning.measures_importance)
        if part is not None:
            self._by_hash[part.sha256] = part
        return part

    def read(self, sha256: str, offset: int, num_bytes: int) -> tuple[Part, bytes]:
        """Return a stretch of the part of that hash, from disk.

        Raises:
            RemoteProtocolError: no part has that hash, or it ends before *offset*.
        """
        part = self.find_part(sha256, offset)
        return part, self.read_part(part, offset, num_bytes)

    def find_part(self, sha256: str, offset: int) -> Part:
        """Return the part of that hash, if it has a byte at *offset*.

        Raises:
            RemoteProtocolError: no part has that hash, or it ends before *offset*.
        """
        part = self._by_hash.get(sha256)
        if part is None or not 0 <= offset < part.num_bytes:
            raise RemoteProtocolError(
                f"no part of this model has sha256 {sha256[:12]}... at byte {offset}"
            )
        return part

    def read_part(self, part: Part, offset: int, num_bytes: int) -> bytes:
        """Return a stretch of a part from disk, where it is written first if it is not there."""
        if not self._cache.has(part):
            if part.name not in self.parts:  # no stretch of the model: it was made for this run
                raise StorageError(f"{part.name} {part.sha256[:12]}... are gone from the cache")
            self._fill(part)
        with self._cache.path(part).open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)

    def _fill(self, part: Part) -> None:
        """Put a part of the model into the cache.

        Raises:
            ModelError: its files are no longer those that the run began with.
        """
        try:
            self._cache.fill(part, partial(self.source.write, part.name))
        except ModelError:
            self._forget_hashes()
            raise

    # ---- engine ----

    def planned_engine(self) -> Engine:
        """Build the engine that the config asks for, before any device has a plan."""
        return self.make_engine(self.first, plan_server(self._config, self.facts, self.first))

    def make_engine(self, first: int, ranks: Mapping[str, int]) -> Engine:
        """Build the blocks that some device leaves to the coordinator; all if it evaluates itself.

        Args:
            first: First block that the coordinator trains.
            ranks: Rank of each of its own adapters.
        """
        layout = self.facts.layout
        holds_all = self._config.holds_all
        present = 0 if holds_all else first
        has_tail = self._config.labels == "server" or holds_all
        parts = [f"block.{i}" for i in range(present, layout.num_blocks)]
        if present == 0 or (has_tail and layout.tail_needs_front):
            parts.append("front")
        elif layout.late and first < layout.num_blocks:
            parts.append("late")
        parts += ["tail"] * has_tail
        spec = EngineSpec(self._config, self.source, tuple(parts), first, ranks)
        return self._make_engine(spec)


def _make_local(spec: EngineSpec) -> Engine:
    made: Engine = import_module("coordinator.engine.local").make_local(spec)
    return made
