"""One schedule and one optimizer for both sides of the cut.

The learning rate is a pure function of the step, so that device and coordinator agree without
talking about it. Knows no model and no network; torch is imported where it is used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


log = logging.getLogger(__name__)

Found = TypeVar("Found")
# torch.amp.GradScaler starts and grows like this.
FIRST_LOSS_SCALE = 65536.0
STEPS_TO_DOUBLE_SCALE = 2000
SCALE = "loss_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the adapters are trained, on the devices and on the coordinator alike."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW of torch, or plain SGD without momentum."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """What the rate does after the warm-up: stay, or fall to 0 at the end of the run."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Number added to the root of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Bound to which each side clips the 2-norm of all its adapters' gradients; 0 for none."""
    rank_penalty: float = 0.0
    """HetLoRA's lambda: weight of |B_tail| |A_tail| in the device's loss, so that ranks it does not
    need fade and are pruned; 0 prunes nothing. Needs `aggregation: zeropad`."""
    rank_kept: float = 0.99
    """HetLoRA's gamma: ranks before gamma r are not in the tail."""
    seed: int = 0
    """Seed of adapter initialisation, data order and dropout."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0.0 < self.rank_kept <= 1.0:
            raise ValueError(f"rank_kept must be in (0, 1], got {self.rank_kept}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "rank_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def to_pairs(config: Any) -> dict[str, str]:
    """Write a flat config dataclass as strings, for the wire.

    Patterns stay here, and what else says which weights are adapted: a plan names every weight.
    """
    is_local = {f.name for f in fields(config) if not f.metadata.get("on_wire", True)}
    return {
        name: ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in asdict(config).items()
        if not isinstance(value, dict) and name not in is_local
    }


def from_pairs(cls: Any, pairs: Mapping[str, str]) -> Any:
    """Read a flat config dataclass back from strings.

    Raises:
        ConfigError: a key is unknown, or a value does not fit its field.
    """
    kinds = {f.name: type(f.default) for f in fields(cls) if f.default_factory is MISSING}
    if unknown := pairs.keys() - kinds.keys():
        raise ConfigError(f"the coordinator sent unknown settings: {', '.join(sorted(unknown))}")
    read = {bool: lambda text: text == "True", tuple: lambda text: tuple(text.split(","))}
    try:
        return cls(**{n: read.get(kinds[n], kinds[n])(text) for n, text in pairs.items()})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the coordinator sent a setting that does not fit: {error}") from error


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the rate of *step* (from 0) among *total_steps*, as transformers schedules it."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1.0 - progress)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


class Optimizer:
    """AdamW or SGD over named parameters, with clipping, schedule and a state that travels."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainingConfig,
        total_steps: int,
        compute: torch.dtype | None = None,
    ) -> None:
        import torch

        self.parameters = dict(parameters)
        # float16 has no room below 6e-8: losses are multiplied by this before a backward pass.
        self.loss_scale = FIRST_LOSS_SCALE if compute == torch.float16 else 1.0
        self._is_scaled = compute == torch.float16
        self._good_steps = 0
        self._config = config
        self._total_steps = total_steps
        groups = list(self.parameters.values())
        self._torch: Any = None
        if groups and config.optimizer == "adamw":
            self._torch = torch.optim.AdamW(
                groups,
                lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )
        elif groups:
            self._torch = torch.optim.SGD(groups, lr=config.learning_rate)

    def go_by(self, config: TrainingConfig) -> None:
        """Take rate, schedule and clipping from *config* from now on."""
        self._config = config

    def step(self, step: int) -> bool:
        """Clip, update with the rate of *step*, and forget the gradients.

        Returns:
            False when a gradient was NaN or infinite: nothing was changed then. In float16 that
            is part of finding the loss scale, which is halved, and True is returned.
        """
        import torch

        if self._torch is None:
            return True
        self._unscale()
        limit = self._config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return self._step(step, is_finite=bool(torch.isfinite(norm)))

    def _unscale(self) -> None:
        """Take the loss scale out of the gradients."""
        if self.loss_scale != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad /= self.loss_scale

    def _step(self, step: int, *, is_finite: bool) -> bool:
        """Update with gradients that are clipped; see `step`."""
        if self._torch is not None:
            if is_finite:
                for group in self._torch.param_groups:
                    group["lr"] = learning_rate(self._config, step, self._total_steps)
                self._torch.step()
            self._torch.zero_grad(set_to_none=True)
        if self._is_scaled:
            self._adjust_scale(is_finite)
        return is_finite or self._is_scaled

    # ---- one step of parameters that lie in several places ----

    def norms(self) -> list[float]:
        """Return the 2-norm of each gradient, the loss scale taken out; `update` goes on."""
        import torch

        self._unscale()
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not grads:
            return []
        found: list[float] = torch.stack(
            [torch.linalg.vector_norm(grad, 2.0, dtype=torch.float32) for grad in grads]
        ).tolist()
        return found

    def update(self, step: int, norm: float) -> bool:
        """Do what `step` does after `norms`, as a part of parameters of which all have *norm*."""
        if self._config.max_grad_norm and math.isfinite(norm):
            factor = min(1.0, self._config.max_grad_norm / (norm + 1e-6))
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= factor
        return self._step(step, is_finite=math.isfinite(norm))

    def scaled(
        self, attempt: Callable[[], Found], seen: Callable[[Found], Iterable[torch.Tensor]]
    ) -> Found:
        """Return what a backward pass finds, in float16 with a loss scale at which that is finite.

        Where it is not, the scale is halved and *attempt* made again: what leaves this side of the
        cut cannot wait for the next step. At a scale of 1 it is returned as it is.

        Args:
            attempt: Goes forward and backward with the loss scale that is due.
            seen: Returns those gradients in what it finds that have to be finite.
        """
        if not self._is_scaled:
            return attempt()
        import torch

        while True:
            held = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
            found = attempt()
            finite = [torch.isfinite(gradient).all() for gradient in seen(found)]
            if self.loss_scale <= 1.0 or not finite or bool(torch.stack(finite).all()):
                return found
            for name, parameter in self.parameters.items():
                parameter.grad = held[name].div_(2) if name in held else None
            self.lower_scale()
            log.info("float16.gradient_overflow effect=loss scale is now %g", self.loss_scale)

    def lower_scale(self) -> None:
        """Halve the loss scale: something was not finite."""
        self.loss_scale, self._good_steps = self.loss_scale / 2, 0

    def _adjust_scale(self, is_finite: bool) -> None:
        self._good_steps = self._good_steps + 1 if is_finite else 0
        if not is_finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self._good_steps % STEPS_TO_DOUBLE_SCALE == 0:
            self.loss_scale *= 2

    def forget_gradients(self) -> None:
        """Drop what backward passes have left."""
        if self._torch is not None:
            self._torch.zero_grad(set_to_none=True)

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the moments, as `<parameter>.<moment>`; in float16 also the scale."""
        if self._torch is None:
            return {}
        scale = {SCALE: np.array([self.loss_scale, self._good_steps])} if self._is_scaled else {}
        return scale | {
            f"{name}.{moment}": value.detach().cpu().numpy().copy()
            for name, parameter in self.parameters.items()
            for moment, value in self._torch.state.get(parameter, {}).items()
            if value is not None
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take moments over wherever name and shape still fit; the rest start fresh."""
        import torch

        if self._is_scaled and SCALE in state:
            self.loss_scale, self._good_steps = float(state[SCALE][0]), int(state[SCALE][1])
        if self._torch is None or self._config.optimizer != "adamw":
            return
        for name, parameter in self.parameters.items():
            moments = {
                m: torch.from_numpy(np.array(state[f"{name}.{m}"]))
                for m in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{m}" in state
            }
            if len(moments) == 3 and moments["exp_avg"].shape == parameter.shape:
                on_device = {
                    m: v if m == "step" else v.to(parameter.device) for m, v in moments.items()
                }
                self._torch.state[parameter] = on_device
            else:
                self._torch.state.pop(parameter, None)


def seed_step(seed: int, device: torch.device, *where: int | str) -> None:
    """Seed *device*'s generator for one micro-batch, so that dropout needs no saved state."""
    import hashlib

    import torch

    digest = hashlib.sha256(" ".join(map(str, (seed, *where))).encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    # Not torch.manual_seed: it looks at every backend, and writes down a stack trace for CUDA.
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):  # else it is the generator of the first one
            torch.cuda.manual_seed(number)
