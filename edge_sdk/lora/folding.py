"""The frozen residual inside the frozen weight: W_0 + U V, computed once a round and no step more.

W_0 stays where it was read from, as a rule a file that is mapped into memory. Each time all of
W_0 + U V is computed from it anew, a weight at a time: what is added never adds up, and whoever
starts again from U V has the same bits. `adapters.py` decides what the residual is.

Legend: E experts, I inputs, O outputs, S rank of the residual.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edge_sdk.lora.factors import Factors
from profiler.sensors.memory import drop_mapped

if TYPE_CHECKING:
    import torch

    from edge_sdk.model.partition import Slice
    from edge_sdk.protocol.plan import Residual

log = logging.getLogger(__name__)

# A mapped weight is read again when memory is scarce, one of our own is not: above this share of
# the whole memory, factors beside the mapped weights are the slower and safer form.
MOST_OF_MEMORY = 0.8


def folds(asked: Residual | str, *, is_quantized: bool) -> bool:
    """Return whether a residual is added to weights: quantised ones take nothing in.

    Weights in 16 bits round the sum, and products in 16 bits round a float32 weight: measured, that
    costs nothing beside what they round anyway (docs/aggregation.md).
    """
    return asked != "low-rank" and not is_quantized


def has_room(num_bytes: int, total_bytes: float | None) -> bool:
    """Return whether weights of *num_bytes* may stand in memory of one's own instead of in a file.

    The whole memory decides, which is always the same, so that whoever starts again decides alike.
    """
    if total_bytes is None or num_bytes <= MOST_OF_MEMORY * total_bytes:
        return True
    log.warning(
        "residual.low_rank weights=%d memory=%.0f effect=it stays beside the weights, step by step",
        num_bytes,
        total_bytes,
    )
    return False


class FoldedWeights:
    """The weights of a slice, each with its residual inside."""

    def __init__(self, slice_: Slice) -> None:
        self._slice = slice_
        self._own: dict[str, torch.Tensor] = {}
        """Weights that are not W_0, by name of the tensor: the only memory that this takes."""

    def fold(self, name: str, residual: Factors, *, is_transposed: bool) -> None:
        """Let tensor *name* be W_0 + U V, or W_0 itself where U V has no rank.

        Args:
            name: A tensor of a present block, (O, I), or (E, O, I) of experts.
            residual: U V.
            is_transposed: Whether the tensor lies the other way round, (I, O) or (E, I, O).
        """
        import torch

        stored, where = self._slice.stored(name), self._slice.device
        if not residual.rank:
            self._own.pop(name, None)
            self._slice.replace(name, stored)
            return
        own = self._own.get(name)
        if own is None:
            own = torch.empty(stored.shape, dtype=self._slice.dtype, device=where)
        is_wide = own.dtype == torch.float32
        sum_ = own if is_wide else torch.empty(stored.shape, dtype=torch.float32, device=where)
        sum_.copy_(stored)
        # Contiguous: the same numbers in another order of memory need not give the same bits.
        laid_out = (torch.from_numpy(np.ascontiguousarray(factor)) for factor in residual)
        u, v = (factor.to(where, torch.float32) for factor in laid_out)
        lying = sum_.mT if is_transposed else sum_
        (lying.addmm_ if lying.dim() == 2 else lying.baddbmm_)(u, v)
        if not is_wide:
            own.copy_(sum_)
        if name not in self._own:
            self._own[name] = own
            self._slice.replace(name, own)
        drop_mapped(stored.data_ptr(), stored.numel() * stored.element_size())


class StoredArray(Protocol):
    """A tensor of a part, as it lies in its file."""

    @property
    def array(self) -> np.ndarray:
        """The numbers; bfloat16 as the bits that it is."""

    @property
    def dtype(self) -> str:
        """What they are, as safetensors calls it."""

    def float32(self) -> np.ndarray:
        """Return a copy in float32."""


class FoldedArrays:
    """The weights of a device without torch, float32, each with its residual inside.

    Args:
        stored: W_0 by name of the tensor.
        transposed: Weights that lie as (I, O), by module name.
        put: Lets an array, which may change in place, stand for a tensor.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredArray],
        transposed: Collection[str],
        put: Callable[[str, np.ndarray], None],
    ) -> None:
        self._stored, self._transposed, self._put = stored, transposed, put
        self._own: dict[str, np.ndarray] = {}

    def fold(self, name: str, residual: Factors) -> None:
        """Let the weight of module *name* be W_0 + U V, or W_0 itself where U V has no rank."""
        tensor = f"{name}.weight"
        kept = self._stored[tensor]
        is_as_it_lies = kept.dtype == "F32"
        if not residual.rank and is_as_it_lies:
            self._own.pop(name, None)
            self._put(tensor, kept.array)
            return
        own = self._own.get(name)
        if own is None:
            own = self._own[name] = np.empty(kept.array.shape, np.float32)
            self._put(tensor, own)
        if residual.rank:
            u_OS, v_SI = residual
            np.matmul(u_OS, v_SI, out=own.T if name in self._transposed else own)
            own += kept.array if is_as_it_lies else kept.float32()
        else:
            own[...] = kept.float32()
        drop_mapped(kept.array.ctypes.data, kept.array.nbytes)
