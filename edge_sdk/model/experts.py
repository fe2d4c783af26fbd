"""Weights of experts, which a model stacks in one parameter of three dimensions.

A mixture of experts keeps the matrices of all experts as one `nn.Parameter` of a module that is no
linear layer; its code takes one matrix at a time, `self.down_proj[expert]`, or multiplies by all of
them at once. A `Stack` stands in the parameter's place. Any operation sees the dense weights, with
what adapters add to them; the products that models really ask for are computed expert by expert,
with factors beside a frozen matrix that may be quantised, and without a dense copy of either.

Families lie in memory in two ways. Here M is the matrix as PEFT counts its outputs and inputs:
(O, I), whichever way the parameter lies.

Legend: E experts, N tokens of one expert, O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from edge_sdk.model.quantized import Packed, Quantized, multiply, pack_matrix

Leave = Callable[[torch.Tensor], torch.Tensor]
Watch = Callable[[torch.Tensor, "Matrix", bool], tuple[torch.Tensor, Leave]]
"""(input x of an expert's matrix W, W, whether the product is x W^T and not x W) -> the x to
multiply, and what becomes of the product."""


class Term(NamedTuple):
    """What an adapter adds to each expert's matrix: `scale` B A."""

    a_ERI: nn.Parameter
    b_EOR: nn.Parameter
    scale: float


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of *model* that hold a matrix for each expert, by name."""
    config: Any = getattr(model, "config", None)
    settings = () if config is None else vars(config.get_text_config()).items()
    counts = {v for name, v in settings if "expert" in name and isinstance(v, int) and v > 1}
    found = {}
    for path, module in model.named_modules():
        own = () if isinstance(module, nn.modules.conv._ConvNd) else module._parameters.items()
        for leaf, weight in own:
            if weight is not None and weight.dim() == 3 and weight.shape[0] in counts:
                found[f"{path}.{leaf}"] = weight
    return found


def lies_transposed(module: nn.Module) -> bool:
    """Return whether PEFT takes the module's experts to lie as (E, I, O)."""
    return bool(getattr(module, "is_transposed", False))


def expert_sizes(module: nn.Module, leaf: str) -> tuple[int, int, int]:
    """Return how many matrices (O, I) parameter *leaf* of *module* holds, with their sizes."""
    weight = module._parameters[leaf]
    assert weight is not None
    num_experts, rows, columns = weight.shape
    return (num_experts, columns, rows) if lies_transposed(module) else (num_experts, rows, columns)


def find_stack(model: nn.Module, name: str) -> Stack | None:
    """Return what stands in the place of parameter *name*; None while nothing does."""
    path, _, leaf = name.rpartition(".")
    found = vars(model.get_submodule(path)).get(leaf) if path else None
    return found if isinstance(found, Stack) else None


def take_place(model: nn.Module, name: str, device: torch.device | None = None) -> Stack:
    """Return the stack in the place of parameter *name*, put there if there was none.

    From now on the model takes one expert at a time: products of all experts at once would need
    their dense weights. *device* is where the weights will lie, if not where they are.
    """
    found = find_stack(model, name)
    if found is None:
        path, _, leaf = name.rpartition(".")
        found = Stack(model.get_submodule(path), leaf, device)
        whole: Any = model
        if whole._can_set_experts_implementation():
            whole.set_experts_implementation("eager")
    return found


class Stack(torch.Tensor):
    """A tensor without memory of its own: a parameter (E, ., .), and what is added to it."""

    terms: dict[str, Term]
    """Adapters by name."""
    watch: Watch | None
    """Sees every product of an expert's matrix, while something is measured."""
    packed: list[Packed]
    """The matrices of all experts, where they are quantised."""

    @staticmethod
    def __new__(cls, owner: nn.Module, leaf: str, device: torch.device | None = None) -> Stack:
        """Stand in for the parameter *leaf* of *owner*."""
        weight = owner._parameters[leaf]
        assert weight is not None
        make: Any = torch.Tensor._make_wrapper_subclass
        stack: Stack = make(cls, weight.shape, dtype=weight.dtype, device=device or weight.device)
        stack.owner, stack.leaf = owner, leaf
        stack.terms, stack.watch, stack.packed = {}, None, []
        stack._split = {}
        # Found before the parameter of that name, which `nn.Module` gives only where nothing is.
        vars(owner)[leaf] = stack
        owner.register_forward_pre_hook(stack._begin)
        owner.register_forward_hook(stack._end)
        return stack

    owner: nn.Module
    leaf: str
    _split: dict[str, tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} met a stack of experts below autograd")

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter holds the M of its experts as (I, O)."""
        return lies_transposed(self.owner)

    def _begin(self, *_: object) -> None:
        # Once for all experts: the gradient of each single one would be as large as all of them.
        self._split = {n: (t.a_ERI.unbind(), t.b_EOR.unbind()) for n, t in self.terms.items()}

    def _end(self, *_: object) -> None:
        self._split = {}

    def factors(self, expert: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Return A, B and scale of every adapter of one expert."""
        found = []
        for name, term in self.terms.items():
            a_ERI, b_EOR = self._split.get(name, (term.a_ERI, term.b_EOR))
            if term.a_ERI.shape[1]:
                found.append((a_ERI[expert], b_EOR[expert], term.scale))
        return found

    # ---- the frozen weights ----

    def quantize(self, kind: Quantized) -> None:
        """Keep the weights as *kind* from the next `take_over` on."""
        rows, columns = self.shape[1:]
        sides = (columns, rows) if self.is_transposed else (rows, columns)
        self.packed = [pack_matrix(*sides, self.dtype, kind) for _ in range(self.shape[0])]

    def take_over(self, weight: torch.Tensor, device: torch.device) -> None:
        """Quantise *weight* (E, ., .), which lies as in the checkpoint, expert by expert."""
        for matrix, dense in zip(self.packed, weight, strict=True):
            matrix.take(dense.T if self.is_transposed else dense, device)

    def base(self, expert: int) -> torch.Tensor:
        """Return the frozen matrix of one expert as the parameter holds it, dense."""
        if self.packed:
            dense = self.packed[expert].dequantize()
            return dense.T if self.is_transposed else dense
        weight = self.owner._parameters[self.leaf]
        assert weight is not None
        return weight[expert]

    def dense(self) -> torch.Tensor:
        """Return the weights of all experts with what is added to them, as the parameter lies."""
        return torch.stack([Matrix(self, expert).dense() for expert in range(self.shape[0])])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and (expert := _one(args[1])) is not None:
            return Matrix(args[0], range(args[0].shape[0])[expert])
        if func is torch.bmm and isinstance(args[1], Stack) and not isinstance(args[0], Stack):
            rows = zip(args[0].unbind(), args[1], strict=True)
            return torch.stack([x_NI @ matrix for x_NI, matrix in rows])
        return _compute(func, args, kwargs)

    def __iter__(self) -> Any:  # noqa: ANN401 - what torch declares
        """Yield the matrices of all experts."""
        return (Matrix(self, expert) for expert in range(self.shape[0]))


class Matrix(torch.Tensor):
    """A tensor without memory of its own: the matrix of one expert in a stack."""

    _stack: Stack
    _expert: int
    __torch_dispatch__ = Stack.__torch_dispatch__  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stack: Stack, expert: int) -> Matrix:
        """Be the matrix of number *expert*."""
        make: Any = torch.Tensor._make_wrapper_subclass
        matrix: Matrix = make(cls, stack.shape[1:], dtype=stack.dtype, device=stack.device)
        matrix._stack, matrix._expert = stack, expert
        return matrix

    @property
    def expert(self) -> int:
        """Number of the expert in its stack."""
        return self._expert

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter holds M as (I, O)."""
        return self._stack.is_transposed

    def base(self) -> torch.Tensor:
        """Return the frozen matrix as the parameter holds it, dense."""
        return self._stack.base(self._expert)

    def dense(self) -> torch.Tensor:
        """Return the matrix with what is added to it, as the parameter holds it."""
        found = self.base()
        for a_RI, b_OR, scale in self._stack.factors(self._expert):
            change = scale * (b_OR @ a_RI)
            found = found + (change.T if self._stack.is_transposed else change).to(found.dtype)
        return found

    def times(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, is_turned: bool = False
    ) -> torch.Tensor:
        """Return `x W`, or `x W^T + bias` where *is_turned*, for the matrix W as it lies."""
        stack, by_outputs = self._stack, is_turned != self._stack.is_transposed
        entering: torch.Tensor = x
        leave: Leave | None = None
        if stack.watch is not None:
            entering, leave = stack.watch(x, self, is_turned)
        if stack.packed:
            y = multiply(entering, stack.packed[self._expert], by_outputs=by_outputs)
        elif is_turned:
            y = F.linear(entering, self.base())
        else:
            y = entering @ self.base()
        if leave is not None:
            y = leave(y)
        found = y
        for a_RI, b_OR, scale in stack.factors(self._expert):
            own = x.to(a_RI.dtype)
            change = (own @ a_RI.T) @ b_OR.T if by_outputs else (own @ b_OR) @ a_RI
            found = found + scale * change
        found = found.to(y.dtype)
        return found if bias is None else found + bias

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is F.linear and isinstance(args[1], Matrix) and not isinstance(args[0], Matrix):
            return args[1].times(*args[:1], *args[2:], **given, is_turned=True)
        if func in _PRODUCTS and isinstance(args[1], Matrix) and not isinstance(args[0], Matrix):
            return args[1].times(args[0])
        return _compute(func, args, kwargs)


_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm)


def _one(index: Any) -> int | None:  # noqa: ANN401 - whatever a model indexes with
    """Return the number of the one expert that *index* asks for; None where it is not one."""
    if isinstance(index, torch.Tensor):
        is_one = index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
        return int(index) if is_one else None
    return index if isinstance(index, int) and not isinstance(index, bool) else None


_T: Any = torch.Tensor
_FACTS = frozenset(
    [getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")]
    + [getattr(_T, name).__get__ for name in ("is_meta", "is_cuda", "requires_grad", "is_leaf")]
    + [_T.dim, _T.size, _T.numel, _T.nelement, _T.is_floating_point, torch.is_floating_point]
    + [_T.__len__]
)
"""What is known without any number."""


def _compute(func: Any, args: Any, kwargs: Mapping[str, Any] | None) -> Any:  # noqa: ANN401
    """Answer what is known without numbers; compute anything else with dense weights."""
    if func in _FACTS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
    args, given = tree_map_only((Stack, Matrix), lambda t: t.dense(), (args, dict(kwargs or {})))
    return func(*args, **given)
