"""AdamW and SGD in numpy, equal to those of `training.Optimizer`: for a device without torch.

The moments have the same names and shapes as torch's, so that a checkpoint does not tell which of
the two has written it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge_sdk.lora.factors import Array
from edge_sdk.runtime.training import TrainingConfig, learning_rate

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# torch.nn.utils.clip_grad_norm_ adds this to the norm.
CLIP_EPSILON = 1e-6


class NumpyOptimizer:
    """Updates named arrays in place, with clipping, schedule and a state that travels."""

    def __init__(
        self, parameters: Mapping[str, Array], config: TrainingConfig, total_steps: int
    ) -> None:
        self._parameters, self._config, self._total_steps = dict(parameters), config, total_steps
        self._gradients: dict[str, Array] = {}
        self._moments: dict[str, dict[str, np.ndarray]] = {}

    def add_gradient(self, name: str, value: Array) -> None:
        """Take in one micro-batch's share of the gradient of parameter *name*."""
        if name in self._gradients:
            self._gradients[name] += value
        else:
            self._gradients[name] = np.array(value, np.float32)

    def add_to_gradient(self, name: str, value: Array) -> None:
        """Add to the gradient of parameter *name* if a backward pass has left one."""
        if name in self._gradients:
            self._gradients[name] += value

    def step(self, step: int) -> bool:
        """Clip, update with the rate of *step*, and forget the gradients.

        Returns:
            False when a gradient was NaN or infinite: nothing was changed then.
        """
        gradients, self._gradients = self._gradients, {}
        norms = [float(np.linalg.norm(g)) for g in gradients.values()]
        norm = math.sqrt(sum(n * n for n in norms))
        if not math.isfinite(norm):
            return False
        limit = self._config.max_grad_norm or math.inf
        clip = np.float32(min(1.0, limit / (norm + CLIP_EPSILON)))
        rate = learning_rate(self._config, step, self._total_steps)
        update = self._adamw if self._config.optimizer == "adamw" else self._sgd
        for name, gradient in gradients.items():
            update(name, gradient * clip if clip < 1 else gradient, rate)
        return True

    def _sgd(self, name: str, gradient: Array, rate: float) -> None:
        self._parameters[name] -= np.float32(rate) * gradient

    def _adamw(self, name: str, gradient: Array, rate: float) -> None:
        config, value = self._config, self._parameters[name]
        moments = self._moments.setdefault(name, _fresh(value))
        moments["step"] += 1
        steps = float(moments["step"])
        value *= np.float32(1 - rate * config.weight_decay)
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        mean += np.float32(1 - config.adam_beta1) * (gradient - mean)
        square *= np.float32(config.adam_beta2)
        square += np.float32(1 - config.adam_beta2) * gradient * gradient
        root = np.sqrt(square) / np.float32(math.sqrt(1 - config.adam_beta2**steps))
        root += np.float32(config.adam_epsilon)
        value -= np.float32(rate / (1 - config.adam_beta1**steps)) * mean / root

    def forget_gradients(self) -> None:
        """Drop what backward passes have left."""
        self._gradients = {}

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the moments, as `<parameter>.<moment>`."""
        return {
            f"{name}.{moment}": value.copy()
            for name, moments in self._moments.items()
            for moment, value in moments.items()
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take moments over wherever name and shape still fit; the rest start fresh."""
        self._moments = {}
        if self._config.optimizer != "adamw":
            return
        for name, parameter in self._parameters.items():
            held = {m: state[f"{name}.{m}"] for m in MOMENTS if f"{name}.{m}" in state}
            if len(held) == len(MOMENTS) and held["exp_avg"].shape == parameter.shape:
                self._moments[name] = {m: np.array(v, np.float32) for m, v in held.items()}


def _fresh(value: Array) -> dict[str, np.ndarray]:
    return {
        "step": np.zeros((), np.float32),
        "exp_avg": np.zeros_like(value),
        "exp_avg_sq": np.zeros_like(value),
    }
