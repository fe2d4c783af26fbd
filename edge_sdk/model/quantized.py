"""Frozen linear layers whose weights are kept in 8 or 4 bits; plain torch, on CPU and CUDA alike.

    int8   w = s q, q in -127..127, one float32 s for each output
    int4   w = s q, q in -8..7, one bfloat16 s for each 32 weights of an output, two q in a byte

Only storage is small: a layer multiplies by float weights, which it makes a stretch of outputs at a
time, forward and backward, and throws away. Knows no files and no adapters.

Legend: N tokens, O outputs, I inputs, R a stretch of outputs, G groups, P bytes of a row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from edge_sdk.errors import ConfigError
from edge_sdk.model.precision import Base

Quantized = Literal["int8", "int4"]

# The best of 32, 64 and 128 for its size, with the best of several ways to choose s
# (docs/quantized.md).
GROUP = 32
# A scale is rounded to bfloat16, by 2^-8 at most: what it divides then stays below 7.5.
MOST_UP, MOST_DOWN = 7.47, 8.0
# Weights that are dequantised at a time: 4 MiB of float32 stay in a processor's cache; a GPU would
# rather have few launches.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}


def resolve_base(base: Base, compute: torch.dtype) -> tuple[torch.dtype, Quantized | None]:
    """Return the dtype of what is not quantised, and the form of linear layers that are.

    Raises:
        ConfigError: products in *compute* cannot be had from such weights.
    """
    if base == "int8" or base == "int4":
        return torch.float32, base
    dtype: torch.dtype = getattr(torch, base)
    if dtype != torch.float32 == compute:
        raise ConfigError(
            f"base: {base} weights do not multiply with float32 activations; set compute to "
            "bfloat16 or float16, or base to float32, int8 or int4"
        )
    return dtype, None


def quantize_linears(block: nn.Module, kind: Quantized) -> None:
    """Put a layer without weights, which will keep them as *kind*, in place of each linear one."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in TWINS:
                setattr(parent, name, TWINS[type(child)](child, kind))


def take_weight(layer: nn.Module, weight: torch.Tensor, device: torch.device) -> bool:
    """Let a quantised *layer* take *weight* over; returns False if *layer* is not quantised."""
    if isinstance(layer, Packed):
        layer.take(weight, device)
    return isinstance(layer, Packed)


# ---- numbers -------------------------------------------------------------------------------------


def pack(w_RI: torch.Tensor, kind: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows of float32 weights; returns codes (R, P) and scales (R, G).

    Each weight comes back within half a step of itself, |s| / 2.
    """
    if kind == "int8":
        scales_R1 = _not_zero(w_RI.abs().amax(1, keepdim=True) / 127)
        return (w_RI / scales_R1).round_().to(torch.int8), scales_R1
    w_RG3 = _grouped(nn.functional.pad(w_RI, (0, -w_RI.shape[1] % GROUP)))
    low_RG, high_RG = -w_RG3.amin(2), w_RG3.amax(2)
    # 4 bits reach one further down than up: s takes the sign that makes the larger side "down".
    plain_RG = torch.maximum(low_RG / MOST_DOWN, high_RG / MOST_UP)
    turned_RG = torch.maximum(high_RG / MOST_DOWN, low_RG / MOST_UP)
    scales_RG = _not_zero(torch.where(plain_RG <= turned_RG, plain_RG, -turned_RG).bfloat16())
    codes_RG3 = (w_RG3 / scales_RG.float()[:, :, None]).round_().clamp_(-8, 7).to(torch.int8)
    first_RP, second_RP = codes_RG3.flatten(1).chunk(2, dim=1)
    return (first_RP & 15) | (second_RP << 4), scales_RG


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory of its own."""
    return torch.empty(shape, dtype=dtype, device=device)


Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


def unpack(
    codes_RP: torch.Tensor, scales_RG: torch.Tensor, num_inputs: int, empty: Empty = fresh
) -> torch.Tensor:
    """Return the float32 weights (R, I) of rows that `pack` has made, in memory from *empty*."""
    rows, size = codes_RP.shape
    if scales_RG.dtype == torch.float32:
        w_RI = empty((rows, size), torch.float32, codes_RP.device)
        return w_RI.copy_(codes_RP).mul_(scales_RG)
    half_RP = empty((rows, size), torch.int8, codes_RP.device)
    w_R2P = empty((rows, 2, size), torch.float32, codes_RP.device)
    torch.bitwise_left_shift(codes_RP, 4, out=half_RP)
    w_R2P[:, 0] = half_RP.bitwise_right_shift_(4)  # arithmetic: the sign comes along
    w_R2P[:, 1] = torch.bitwise_right_shift(codes_RP, 4, out=half_RP)
    _grouped(w_R2P).mul_(scales_RG.float()[:, :, None])
    return w_R2P.flatten(1)[:, :num_inputs]


class _Scratch(threading.local):
    """One piece of memory for each dtype and thread, used again and again.

    Fresh ones would leave holes between the activations that a training step keeps: with them, a
    slice of int4 took more memory in training than one of int8.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __call__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return memory that holds until the next call with this dtype."""
        held, size = self._held.get((dtype, device)), math.prod(shape)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # what is made in it cannot be written to later
                held = self._held[dtype, device] = fresh((size,), dtype, device)
        return held[:size].view(shape)


_scratch = _Scratch()


def _grouped(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(rows.shape[0], -1, GROUP)


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    """Replace scales of 0, which rows or groups of zeros have, by one that divides."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


# ---- layers --------------------------------------------------------------------------------------


def multiply(x: torch.Tensor, layer: Packed, *, by_outputs: bool = True) -> torch.Tensor:
    """Return `x M^T + bias`, or `x M` if not *by_outputs*, for the quantised matrix M (O, I)."""
    rows: Any = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _Multiply.apply(rows, layer, by_outputs)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])  # out here, where a model may change it in place


class _Multiply(torch.autograd.Function):
    """`x M^T` or `x M` with an M that is made when it is needed and not kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed, by_outputs: bool) -> torch.Tensor:
        """Multiply rows in autocast's dtype where there is one, as `nn.Linear` does."""
        kind = x.device.type
        is_cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_cast else x.dtype
        ctx.layer, ctx.dtype, ctx.by_outputs = layer, x.dtype, by_outputs
        x = x.to(dtype)
        y = _to_outputs(x, layer) if by_outputs else _to_inputs(x, layer).to(dtype)
        if layer.bias is not None:
            y += layer.bias.to(dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return dL/dx = dL/dy M, or dL/dy M^T."""
        back = _to_inputs if ctx.by_outputs else _to_outputs
        return back(grad, ctx.layer).to(ctx.dtype), None, None


def _to_outputs(x_NI: torch.Tensor, layer: Packed) -> torch.Tensor:
    """Return x M^T."""
    y_NO = x_NI.new_empty(x_NI.shape[0], layer.num_outputs)
    for rows in layer.stretches():
        torch.mm(x_NI, layer.rows(rows, x_NI.dtype).T, out=y_NO[:, rows])
    return y_NO


def _to_inputs(y_NO: torch.Tensor, layer: Packed) -> torch.Tensor:
    """Return y M; stretches add up in float32."""
    wide = torch.promote_types(y_NO.dtype, torch.float32)
    total_NI = y_NO.new_zeros(y_NO.shape[0], layer.num_inputs, dtype=wide)
    for rows in layer.stretches():
        w_RI = layer.rows(rows, y_NO.dtype)
        if wide == y_NO.dtype:
            total_NI.addmm_(y_NO[:, rows], w_RI)
        else:
            total_NI += y_NO[:, rows] @ w_RI
    return total_NI


class Packed(nn.Module):
    """What both kinds of linear layers share; takes no memory until `take` gives it weights."""

    codes: nn.Parameter
    """(O, P) int8; two codes in each for int4."""
    scales: nn.Parameter
    """(O, 1) float32, or (O, G) bfloat16 for int4."""
    bias: nn.Parameter | None
    is_transposed = False
    """Whether the checkpoint, and `weight`, hold (I, O)."""

    def __init__(self, twin: nn.Module, kind: Quantized) -> None:
        """Become what *twin* is, whose weight lies on the meta device."""
        nn.Module.__init__(self)  # nn.Linear's own would take memory for the weight
        self.kind: Quantized = kind
        shape = twin.get_parameter("weight").shape
        self.num_outputs, self.num_inputs = shape[::-1] if self.is_transposed else shape
        self.dtype = twin.get_parameter("weight").dtype
        self.register_parameter("bias", twin._parameters["bias"])
        self._keep(*pack(torch.empty(self.num_outputs, self.num_inputs, device="meta"), kind))

    def _keep(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def take(self, weight: torch.Tensor, device: torch.device) -> None:
        """Quantise *weight*, which lies as in the checkpoint, on *device*, a stretch at a time."""
        w_OI = weight.T if self.is_transposed else weight
        self._keep(*(torch.empty_like(p, device=device) for p in (self.codes, self.scales)))
        # Small ones: a dozen tensors of this size come and go, and leave holes in the heap.
        for rows in self.stretches(16):
            codes, scales = pack(w_OI[rows].to(device, torch.float32), self.kind)
            self.codes[rows], self.scales[rows] = codes, scales

    def stretches(self, parts: int = 1) -> Iterator[slice]:
        """Yield the outputs that are computed together, or a share of so many."""
        chunk = CHUNK.get(self.codes.device.type, CHUNK["cuda"]) // parts
        rows = max(1, chunk // self.num_inputs)
        for first in range(0, self.num_outputs, rows):
            yield slice(first, min(first + rows, self.num_outputs))

    def rows(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights of some outputs, (R, I), valid until this thread asks for others."""
        w_RI = unpack(self.codes[rows], self.scales[rows], self.num_inputs, _scratch)
        if dtype == torch.float32:
            return w_RI
        return _scratch(tuple(w_RI.shape), dtype, w_RI.device).copy_(w_RI)

    def dequantize(self) -> torch.Tensor:
        """Return a dense copy of the weight as it is computed with, in the checkpoint's layout."""
        w_OI = unpack(self.codes, self.scales, self.num_inputs).to(self.dtype)
        return w_OI.T if self.is_transposed else w_OI

    @property
    def weight(self) -> torch.Tensor:
        """What looks like the weight, and becomes `dequantize()` wherever it is computed with.

        PEFT asks some twenty times, and a few models do, for no more than shape, dtype and device.
        """
        return _Promise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O)."""
        return multiply(x, self)


class _Promise(torch.Tensor):
    """A tensor without memory that is a layer's dense weight to any operation."""

    _layer: Packed

    @staticmethod
    def __new__(cls, layer: Packed) -> _Promise:
        size = (layer.num_outputs, layer.num_inputs)[:: -1 if layer.is_transposed else 1]
        make: Any = torch.Tensor._make_wrapper_subclass
        promise: _Promise = make(cls, size, dtype=layer.dtype, device=layer.codes.device)
        promise._layer = layer
        return promise

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda p: p._layer.dequantize(), (args, kwargs or {}))
        return func(*args, **kwargs)


class QuantizedLinear(Packed, nn.Linear):  # type: ignore[misc, override]
    """`nn.Linear`; to PEFT too, which puts adapters around it as around any other."""

    def __init__(self, twin: nn.Module, kind: Quantized) -> None:
        super().__init__(twin, kind)
        self.in_features, self.out_features = self.num_inputs, self.num_outputs


class QuantizedConv1D(Packed, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight lies the other way round."""

    is_transposed = True

    def __init__(self, twin: nn.Module, kind: Quantized) -> None:
        super().__init__(twin, kind)
        self.nx, self.nf = self.num_inputs, self.num_outputs


# Exactly these: what is derived from them may look at its weight in ways of its own.
TWINS: dict[type[nn.Module], type[Packed]] = {
    nn.Linear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
}


def pack_matrix(num_outputs: int, num_inputs: int, dtype: torch.dtype, kind: Quantized) -> Packed:
    """Return a matrix (O, I) without weights, which it will keep as *kind*; an expert's, say."""
    twin = nn.Linear(num_inputs, num_outputs, bias=False, device="meta", dtype=dtype)
    return QuantizedLinear(twin, kind)
