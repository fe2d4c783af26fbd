"""The `Runtime` of a device without torch: onnxruntime, and numpy around it.

Nothing is kept between forward and backward but what entered each block: a block's gradient graph
runs its forward pass again, so that memory is that of one block, however many there are. Knows no
network; graphs are run in `onnx_session.py`.

Legend: B sequences, T positions, D hidden size, N targets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edge_sdk.data.batches import MicroBatch
from edge_sdk.data.encoding import IGNORE
from edge_sdk.errors import ConfigError, NumericError
from edge_sdk.lora.factors import Array, zero
from edge_sdk.lora.folding import FoldedArrays, has_room
from edge_sdk.lora.numpy_adapters import NumpyAdapters
from edge_sdk.lora.rank_pruning import penalty_gradients
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.safetensors_files import Stored
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.interface import MemoryUse, TailSums, process_memory
from edge_sdk.runtime.numpy_optimizer import NumpyOptimizer
from edge_sdk.runtime.onnx_graphs import Graphs
from edge_sdk.runtime.onnx_session import OnnxModel
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.runtime.training_state import NumpyTrainingState
from profiler.estimate.sizes import TAIL_TARGETS, targets_at_once
from profiler.sensors.memory import memory_info


class _Open(NamedTuple):
    """A micro-batch whose gradient is awaited."""

    entered: list[Any]
    """What entered each block."""
    lengths_B: np.ndarray
    is_measured: bool


def _folds(graphs: Graphs, weights: Mapping[str, Stored], plan: Plan) -> bool:
    """Return whether residuals go into the weights; see `edge_sdk/lora/folding.py`."""
    if plan.residual == "low-rank" or not graphs.can_fold:
        return False
    matrices = (t.array for n, t in weights.items() if n.startswith(graphs.about.blocks_path))
    num_bytes = sum(4 * array.size for array in matrices)
    return plan.residual == "folded" or has_room(num_bytes, memory_info().total.value)


class OnnxRuntime:
    """Blocks 0 .. split-1 of a model, their adapters, and the tail where the plan says so.

    Args:
        graphs: The slice's graphs.
        parts: The tensors of each part, as `safetensors_files.map_part` gives them.
        plan: What to run.
        lora: How the run's adapters are made.
        training: How the run trains them.
        total_steps: Steps of the whole run.
        threads: CPU threads; None leaves onnxruntime's own choice.

    Raises:
        ConfigError: the run uses dropout.
        ModelError: graphs and parts do not belong together.
    """

    def __init__(
        self,
        graphs: Graphs,
        parts: Mapping[str, Mapping[str, Stored]],
        plan: Plan,
        lora: LoraConfig,
        training: TrainingConfig,
        total_steps: int,
        *,
        threads: int | None = None,
    ) -> None:
        if lora.lora_dropout:
            raise ConfigError(
                "lora.lora_dropout: the onnxruntime backend draws no random numbers; set it to 0"
            )
        weights = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
        self._training = training
        self._plan, self._is_causal = plan, graphs.about.task == "causal-lm"
        folds = _folds(graphs, weights, plan)
        self._model = OnnxModel(graphs, weights, threads, folds=folds)
        self._matrices = [t.array.shape for t in weights.values() if t.array.ndim == 2]
        # No matrix is longer than the vocabulary is, or little.
        longest = max((max(shape) for shape in self._matrices), default=1)
        self._tail_targets = min(TAIL_TARGETS, targets_at_once(longest))
        targets = self._model.targets()
        folded = FoldedArrays(weights, graphs.transposed(), self._model.replace) if folds else None
        for name, shape in targets.items() if folded else ():
            assert folded is not None
            folded.fold(name, zero(*shape))
        self._adapters = NumpyAdapters(
            targets,
            plan.ranks,
            plan.alphas,
            lora,
            training.seed,
            fold=folded.fold if folded else None,
        )
        head = graphs.about.head if plan.tail else ()
        self._head: dict[str, Array] = {name: weights[name].float32() for name in head}
        for name, array in self._head.items():
            self._model.replace(name, array)
        trained = {**self._adapters.parameters, **self._head}
        self._optimizer = NumpyOptimizer(trained, training, total_steps)
        self._open: deque[_Open] = deque()
        self.state = NumpyTrainingState(
            self._adapters, self._optimizer, plan.ranks, self._head, self._open
        )
        self._importance = self.state.meter

    # ---- training ----

    @property
    def has_local_tail(self) -> bool:
        """Whether the tail looks at single positions; see `Runtime`. Its graph takes no others."""
        return self._is_causal

    def forward(self, micro: MicroBatch, step: int, index: int) -> Array:
        """Run the device's blocks; see `Runtime`."""
        *entered, hidden = self._run_blocks(micro)
        lengths_B = micro.lengths.astype(np.int64)
        if not self._plan.is_forward_only:
            self._open.append(_Open(entered, lengths_B, self._importance.is_due(step)))
        hidden_BTD: Array = hidden.numpy()
        return hidden_BTD

    def is_random(self, micro: MicroBatch) -> bool:
        """Return whether `forward` gives another h each time; graphs draw no random numbers."""
        return False

    def _run_blocks(self, micro: MicroBatch) -> list[Any]:
        """Return what enters each block, and what leaves the last one."""
        lengths_B = micro.lengths.astype(np.int64)
        hidden = [self._model.enter(micro.input_ids, lengths_B)]
        for block in range(self._plan.split):
            output = self._model.block(block, hidden[-1], lengths_B, self._adapters.factors)
            hidden.append(output)
        return hidden

    def backward(self, grad_BTD: Array) -> None:
        """Continue the backward pass from dL/dh; see `Runtime`."""
        if self._plan.is_forward_only:
            return
        assert self._open, "backward without forward"
        entered, lengths_B, is_measured = self._open.popleft()
        grad: Any = np.ascontiguousarray(grad_BTD, dtype=np.float32)
        lowest = 0 if is_measured else self._lowest_trained()
        for block in reversed(range(lowest, self._plan.split)):
            given = {"hidden": entered.pop(), "grad": grad, "lengths": lengths_B}
            grad = self._pull(block, given, goes_on=block > lowest, measures=is_measured)

    def _lowest_trained(self) -> int:
        """Return the first block that has an adapter; the number of blocks if none has."""
        prefixes = [self._model.prefix(block) for block in range(self._plan.split)]
        is_trained = [any(n.startswith(p) for n in self._adapters.ranks) for p in prefixes]
        return is_trained.index(True) if any(is_trained) else self._plan.split

    def _pull(self, block: int, given: dict[str, Any], *, goes_on: bool, measures: bool) -> Any:
        """Run one block's backward pass; return the gradient of what entered it, if needed."""
        prefix = self._model.prefix(block)
        inside = [n.removeprefix(prefix) for n in self._plan.ranks if n.startswith(prefix)]
        trained = [n for n in inside if prefix + n in self._adapters.ranks]
        wanted = [f"grad:{n}.{factor}" for n in trained for factor in "AB"]
        wanted += [f"{self._importance.form}:{n}" for n in inside] if measures else []
        wanted += ["grad:hidden"] if goes_on else []
        outputs = self._model.pull(block, given, self._adapters.factors, wanted, measures=measures)
        for name in trained:
            full = prefix + name
            self._optimizer.add_gradient(f"{full}.A", outputs[f"grad:{name}.A"].numpy())
            # The graph knows s B: dL/dB = s dL/d(s B).
            grad_OR = outputs[f"grad:{name}.B"].numpy() * np.float32(self._adapters.scale(full))
            self._optimizer.add_gradient(f"{full}.B", grad_OR)
        for name in inside if measures else ():
            self._importance.add(
                prefix + name, float(outputs[f"{self._importance.form}:{name}"].numpy())
            )
        return outputs.get("grad:hidden")

    def tail(
        self, final_hidden_BTD: Array, micro: MicroBatch, num_targets: int
    ) -> tuple[TailSums, Array]:
        """Return loss and dL/dh of the final hidden state; see `Runtime`."""
        sums, grad_BTD = self._tail(final_hidden_BTD, micro, 1.0 / num_targets)
        assert grad_BTD is not None
        return sums, grad_BTD

    def _tail(
        self, final_hidden_BTD: Array, micro: MicroBatch, share: float | None
    ) -> tuple[TailSums, Array | None]:
        """Return the loss and, unless *share* is None, gradients times that."""
        wanted = ["loss", "hits"]
        if share is not None:
            wanted += ["grad:hidden", *(f"grad:{name}" for name in self._head)]
        if not self._is_causal:
            labels_B = micro.labels.astype(np.int64)
            # Norm and head look at one position: where the sequence ends says which.
            ends_B = micro.lengths if micro.pooled is None else micro.pooled + 1
            ends_B = ends_B.astype(np.int64)
            outputs = self._model.tail(final_hidden_BTD, ends_B, labels_B, wanted)
            loss_sum, hits = float(outputs["loss"].numpy()), int(outputs["hits"].numpy())
            sums = TailSums(loss_sum, len(labels_B), hits)
            return sums, self._tail_gradients(outputs, share)
        return self._tail_of_targets(final_hidden_BTD, micro, wanted, share)

    def _tail_gradients(self, outputs: Mapping[str, Any], share: float | None) -> Array | None:
        if share is None:
            return None
        for name in self._head:
            self._optimizer.add_gradient(name, outputs[f"grad:{name}"].numpy() * np.float32(share))
        grad: Array = outputs["grad:hidden"].numpy() * np.float32(share)
        return grad

    def _tail_of_targets(
        self, final_hidden_BTD: Array, micro: MicroBatch, wanted: list[str], share: float | None
    ) -> tuple[TailSums, Array | None]:
        """Return a causal LM's loss, some targets at a time: no logits where there is none."""
        labels_BT = np.full_like(micro.labels, IGNORE)
        labels_BT[:, :-1] = micro.labels[:, 1:]
        rows_N, positions_N = np.nonzero(labels_BT != IGNORE)
        grad_BTD = None if share is None else np.zeros_like(final_hidden_BTD)
        loss_sum, hits = 0.0, 0
        for first in range(0, len(rows_N), self._tail_targets):
            part = slice(first, first + self._tail_targets)
            where = rows_N[part], positions_N[part]
            labels_N = labels_BT[where].astype(np.int64)
            lengths = np.array([len(labels_N)])
            outputs = self._model.tail(final_hidden_BTD[where][None], lengths, labels_N, wanted)
            if grad_BTD is not None:
                grad_BTD[where] = self._tail_gradients(outputs, share)
            loss_sum += float(outputs["loss"].numpy())
            hits += int(outputs["hits"].numpy())
        return TailSums(loss_sum, len(rows_N), hits), grad_BTD

    def local(self, micro: MicroBatch, num_targets: int, step: int, index: int) -> TailSums:
        """Run the whole model forward and backward; see `Runtime`."""
        sums, grad_BTD = self.tail(self.forward(micro, step, index), micro, num_targets)
        self.backward(grad_BTD)
        return sums

    def step(self, step: int) -> None:
        """Update the adapters; see `Runtime`."""
        if self._training.rank_penalty:
            self._add_penalty()
        if not self._optimizer.step(step):
            raise NumericError(f"step {step}: a gradient of the device's adapters is not finite")
        self._importance.close_step(step)

    def _add_penalty(self) -> None:
        weight = np.float32(self._training.rank_penalty)
        for name, pair in self._adapters.pairs().items():
            grads = penalty_gradients(pair, self._training.rank_kept)
            self._optimizer.add_to_gradient(f"{name}.A", weight * grads.a_RI)
            self._optimizer.add_to_gradient(f"{name}.B", weight * grads.b_OR)

    # ---- evaluation ----

    def forward_eval(self, micro: MicroBatch) -> Array:
        """Run the device's blocks; see `Runtime`."""
        lengths_B = micro.lengths.astype(np.int64)
        hidden = self._model.enter(micro.input_ids, lengths_B)
        for block in range(self._plan.split):
            hidden = self._model.block(block, hidden, lengths_B, self._adapters.factors)
        hidden_BTD: Array = hidden.numpy()
        return hidden_BTD

    def tail_eval(self, final_hidden_BTD: Array, micro: MicroBatch) -> TailSums:
        """Return the loss without gradients; see `Runtime`."""
        return self._tail(final_hidden_BTD, micro, None)[0]

    # ---- memory ----

    def most_bytes(self) -> int:
        """Return an upper bound for the bytes of all factors and residuals; see `Runtime`."""
        return 4 * 4 * int(sum(sum(shape) * min(shape) for shape in self._matrices))

    def memory_in_use(self) -> MemoryUse:
        """Return memory now, and the most since the process began; see `Runtime`."""
        return process_memory()
