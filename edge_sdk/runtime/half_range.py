"""float16 as far as its range goes: where numbers leave it, products go on in bfloat16.

Hidden states of some models, often a few channels of the first tokens, are larger than 65,504: in
float16 they become infinite, and everything after them NaN. bfloat16 has the range of float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from edge_sdk.model.precision import autocast

log = logging.getLogger(__name__)

Result = TypeVar("Result")
LARGEST = torch.finfo(torch.float16).max
STATE = "left_float16"


class Products:
    """In which dtype matrix products run: float16 only until something does not fit into it."""

    def __init__(
        self, compute: torch.dtype, device: torch.device, blocks: Sequence[nn.Module]
    ) -> None:
        """Begin with *compute*, on *device*; *blocks* are the model's, to name one of them."""
        self.dtype = compute
        self.has_left = False
        """Whether float16 was asked for, and had no room."""
        self._device, self._blocks = device, blocks

    def run(self, work: Callable[[], Result], seen: Callable[[Result], torch.Tensor]) -> Result:
        """Return what *work* computes; it is done again where float16 has no room.

        Args:
            work: Computes the same whenever it is called.
            seen: Returns the part of its result that has to be finite.
        """
        result = self._run(work, self.dtype)
        if self.dtype != torch.float16 or bool(torch.isfinite(seen(result)).all()):
            return result
        wide = self._wide()
        again = self._run(work, wide)
        if not torch.isfinite(seen(again)).all():
            return result  # it is not for lack of range
        block, largest = self._largest(work, wide)
        name = str(wide).removeprefix("torch.")
        log.warning(
            "float16.overflow block=%s largest=%.4g allowed=%g effect=%s",
            block,
            largest,
            LARGEST,
            f"products are computed in {name} from here on; `compute: {name}` does so at once",
        )
        self.leave()
        return again

    def leave(self) -> None:
        """Compute in a wider range from now on, if it was float16."""
        if self.dtype == torch.float16:
            self.dtype, self.has_left = self._wide(), True

    def state(self) -> dict[str, np.ndarray]:
        """Return what a restart has to know, so that it goes on in the same dtype."""
        return {STATE: np.array(1)} if self.has_left else {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on as `state` says."""
        if STATE in state:
            self.leave()

    def _wide(self) -> torch.dtype:
        is_cuda = self._device.type == "cuda"
        has = not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has else torch.float32

    def _run(self, work: Callable[[], Result], dtype: torch.dtype) -> Result:
        with autocast(dtype, self._device):
            return work()

    def _largest(self, work: Callable[[], Any], wide: torch.dtype) -> tuple[str, float]:
        """Return the first block that float16 has no room for, and its largest number."""
        found = [index for index, top in enumerate(self._tops(work, torch.float16)) if top != top]
        tops = self._tops(work, wide)
        if not found:
            return "head", max(tops, default=0.0)
        return str(found[0]), tops[found[0]]

    def _tops(self, work: Callable[[], Any], dtype: torch.dtype) -> list[float]:
        """Return the largest number that comes up in each block; NaN for infinity, 0 for none."""
        tops = [0.0] * len(self._blocks)

        def look(index: int, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    top = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
                    tops[index] = max(tops[index], top) if top < float("inf") else float("nan")

        with ExitStack() as hooks, torch.no_grad():
            for index, block in enumerate(self._blocks):
                for module in block.modules():
                    handle = module.register_forward_hook(
                        lambda _m, _a, output, index=index: look(index, output)
                    )
                    hooks.callback(handle.remove)
            self._run(work, dtype)
        return tops
