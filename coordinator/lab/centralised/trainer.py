"""The centralised baselines: the whole model and all data on one machine, adapters or all weights.

A device that holds every block trains in this way, too (`TorchRuntime.local`), so that comparisons
compare methods and not implementations. Knows no run folder and no network.

Legend: B sequences, T positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.engine.whole import IntArray, Manner, continue_texts, predict_whole
from coordinator.planning.fixed import plan_device
from edge_sdk.data.batches import Batches, MicroBatch, StepBatch, eval_batches
from edge_sdk.data.rows import load_data
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.errors import ConfigError
from edge_sdk.lora.adapters import initial_pair
from edge_sdk.lora.targets import ModelFacts
from edge_sdk.protocol.messages import Stamp, StepReport
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.interface import TailSums, add_up
from edge_sdk.runtime.torch_runtime import TorchRuntime
from profiler.sensors.memory import peak_rss

POOLED = "pooled"
"""Name in place of a device's, which also decides the order of its samples."""

Dataset = Iterable[Mapping[str, Any]] | Sequence[Example]
"""Rows as a device takes them, or what they are once tokenised."""


class MicroShape(NamedTuple):
    """Size of one micro-batch, which decides the cost of its computation."""

    num_sequences: int
    """B, the number of its sequences."""
    num_positions: int
    """T, its length in tokens, padding included."""
    num_tokens: int
    """Number of its tokens without padding."""


class WholeRuntime(TorchRuntime):
    """The whole model with all of its weights trained; no adapters."""

    def _trained_head(self) -> dict[str, nn.Parameter]:
        """Return all weights of the model; see `TorchRuntime`."""
        layout = self.slice.layout
        ours = {name for part in layout.part_names() for name in layout.part(part)}
        # Tied weights are named once. What no forward uses belongs to no part and stays as it was.
        named = self.slice.model.named_parameters()
        trained = {name: p for name, p in named if name in ours}
        for parameter in trained.values():
            parameter.data = parameter.data.clone()  # never train in the model's memory-mapped file
        return trained


class PooledTrainer:
    """One machine with the whole model, its optimizer and everybody's data."""

    def __init__(
        self, config: ServeConfig, model: ServerModel, dataset: Dataset | None = None
    ) -> None:
        """Read the data and build the model.

        Args:
            config: The run; what it says of devices counts for sizes only.
            model: The model on disk.
            dataset: The data, where it is in memory; None: what `config.pooled` names.

        Raises:
            ConfigError: no data, or sizes that do not fit.
            DataError: something is wrong with the data; the message names file and line.
        """
        self.config, self.model = config, model
        self.plan = plan_pooled(config, model.facts)
        examples, held_out = load_pooled(config, model, dataset)
        pad_id = model.text_config.pad_token_id or 0
        self.batches = Batches(
            examples,
            self.plan.batch_size,
            self.plan.micro_batch,
            config.training.seed,
            POOLED,
            pad_id=pad_id,
        )
        self.held_out: list[MicroBatch] = []
        """Batches that `validation` or `validation_fraction` holds back from training."""
        if held_out:
            size = config.evaluation.batch_size
            self.held_out = list(eval_batches(held_out, size, pad_id=pad_id))
        self.runtime = make_runtime(config, model, self.plan)
        self._shapes: dict[int, tuple[MicroShape, ...]] = {}

    def train(self, stamp: Stamp) -> StepReport:
        """Run one optimizer step, as a device with all blocks does it.

        Raises:
            NumericError: a gradient is NaN or infinite; nothing was changed.
        """
        began, loss_sum = time.monotonic(), 0.0
        step = self.batches.at(stamp.step)
        self._shapes[stamp.step] = _shapes(step)
        for index, micro in enumerate(step.micro_batches):
            sums = self.runtime.local(micro, step.num_targets, stamp.step, index)
            loss_sum += sums.loss_sum
        self.runtime.step(stamp.step)
        return StepReport(
            stamp=stamp,
            loss=loss_sum / step.num_targets,
            num_targets=step.num_targets,
            num_sequences=self.plan.batch_size,
            num_tokens=step.num_tokens,
            compute_s=time.monotonic() - began,
            wait_s=0.0,
            peak_bytes=int(peak_rss().value or 0),
        )

    def evaluate(self, batches: Sequence[MicroBatch]) -> TailSums:
        """Return the loss over *batches*, without dropout."""
        runtime = self.runtime
        return add_up([runtime.tail_eval(runtime.forward_eval(micro), micro) for micro in batches])

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the class of each sequence; see `Engine`."""
        return predict_whole(self.runtime.slice, self.runtime.products, micro)

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the model adds to each prompt; see `Engine`."""
        return continue_texts(self.runtime.slice, self.runtime.products, prompts, manner)

    def shapes(self, step: int) -> tuple[MicroShape, ...]:
        """Return the micro-batches of *step*, in their order; the same on every call."""
        if step not in self._shapes:
            self._shapes[step] = _shapes(self.batches.at(step))
        return self._shapes[step]


def _shapes(step: StepBatch) -> tuple[MicroShape, ...]:
    return tuple(
        MicroShape(len(m.lengths), m.input_ids.shape[1], m.num_tokens) for m in step.micro_batches
    )


def plan_pooled(config: ServeConfig, facts: ModelFacts) -> Plan:
    """Return the plan of a device with all blocks whose step is as large as all devices' together.

    Raises:
        ConfigError: a rank that the model cannot have, or a micro-batch that does not divide.
    """
    pooled = config.pooled
    batch = pooled.batch_size or samples_of_a_step(config)
    at_most = config.settings("").batch_size or batch
    micro = pooled.micro_batch or max(n for n in range(1, at_most + 1) if batch % n == 0)
    if batch % micro:
        raise ConfigError(f"pooled.micro_batch: {micro} does not divide batch_size {batch}")
    whole = replace(config.default, split="all", batch_size=batch, micro_batch=micro)
    plan = plan_device(
        replace(config, planning=PlanningConfig(), default=whole, devices={}), facts, ""
    )
    return replace(plan, ranks={}, alphas={}) if pooled.trains == "all" else plan


def samples_of_a_step(config: ServeConfig) -> int:
    """Return the sequences of one step of all devices, with settings of their own or without.

    Where rounds draw some of them it is the mean over those who can be drawn, to the nearest.
    """
    named = [config.settings(name).batch_size or 0 for name in config.devices]
    others = max(0, config.min_devices - len(named))
    every = sum(named) + others * (config.settings("").batch_size or 0)
    return max(1, round(every * config.drawn_share(len(named) + others)))


def make_runtime(config: ServeConfig, model: ServerModel, plan: Plan) -> TorchRuntime:
    """Return a runtime of the whole model whose adapters begin as those of every device."""
    source = model.source
    kind = WholeRuntime if config.pooled.trains == "all" else TorchRuntime
    runtime = kind(
        config=source.config,
        task=config.task,
        layout=source.layout,
        parts={name: source.tensors(name) for name in source.layout.part_names()},
        plan=plan,
        lora=config.lora,
        training=config.training,
        total_steps=config.total_steps,
        device=config.device,
        compute=config.compute,
        base=config.base,
    )
    runtime.state.adapters.load_pairs(
        {
            name: initial_pair(name, rank, model.facts.targets[name], config.training.seed)
            for name, rank in plan.ranks.items()
            if rank
        }
    )
    return runtime


def load_pooled(
    config: ServeConfig, model: ServerModel, dataset: Dataset | None
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, source after source, and those that are held out.

    Raises:
        ConfigError: nothing says where the data is.
        DataError: something is wrong with the data; the message names file and line.
    """
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Example):
        return [e for e in dataset if isinstance(e, Example)], []
    sources = config.pooled.sources if dataset is None else (dataset,)
    if not sources:
        raise ConfigError(
            "pooled.data.path: names no training data, which a run that is trained by the "
            "coordinator needs; or give pooled.files"
        )
    train: list[Example] = []
    held_out: list[Example] = []
    for index, source in enumerate(sources):
        own = config.pooled.data if index == 0 else replace(config.pooled.data, validation=None)
        for rows, examples in zip(
            load_data(source, own, config.training.seed), (train, held_out), strict=True
        ):
            examples += tokenize_rows(rows, model.tokenizer, own, _limits(config, model))
    return train, held_out


def _limits(config: ServeConfig, model: ServerModel) -> ModelLimits:
    return ModelLimits(
        vocab_size=model.text_config.vocab_size,
        max_positions=model.max_length,
        num_labels=len(config.label_names) or None,
        label_names=config.label_names,
    )
