"""The whole model with what a run has learned, as the coordinator holds it: in the run's base.

One copy of the model, on the run's device, loaded part by part. What an export is checked against
is `check.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from coordinator.config.run import ServeConfig
from coordinator.engine.blocks import load_slice
from coordinator.engine.whole import IntArray, Manner, continue_texts, evaluate_whole, predict_whole
from coordinator.export.check import learn
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.model.precision import resolve_compute
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.half_range import Products
from edge_sdk.runtime.interface import TailSums, add_up


class TrainedModel:
    """A run's model, to be evaluated and to be asked.

    Args:
        config: The run: its base, its dtype of products, and where it computes.
        source: The model on disk.
        learned: dW by weight; empty: the model as it was before training.
        head: Parameters that were trained in full.
    """

    def __init__(
        self,
        config: ServeConfig,
        source: ModelSource,
        learned: Mapping[str, Factors],
        head: Mapping[str, Array],
    ) -> None:
        self._slice = load_slice(config, source, source.layout.part_names())
        learn(self._slice, learned, head)
        compute = resolve_compute(config.compute, self._slice.device)
        self._products = Products(compute, self._slice.device, self._slice.blocks)

    def evaluate(self, batches: Iterable[MicroBatch]) -> TailSums:
        """Return the loss on *batches*, without dropout."""
        return add_up([evaluate_whole(self._slice, self._products, micro) for micro in batches])

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the class of each sequence; see `whole.py`."""
        return predict_whole(self._slice, self._products, micro)

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the model adds to each prompt; see `whole.py`."""
        return continue_texts(self._slice, self._products, prompts, manner)
