"""A device of its own for torch, `far`, whose numbers lie on the CPU: finds what CUDA would refuse.

Where tensors of two devices meet in one operation, CUDA raises an error and the CPU never does.
Here an operation says on which device each of its tensors lies, as CUDA's do, and raises
`DeviceMix`; it is computed by the CPU all the same. What would make a thread wait for the device is
counted, with the line that asked for it.

torch can be given one such device in a process and for good, so this is for a process of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).parents[1])
NAME = "far"
ATEN = torch.ops.aten
# What is known only when all the work before it is done.
WAITS = {
    ATEN._local_scalar_dense.default: "number",
    ATEN.nonzero.default: "nonzero",
    ATEN.equal.default: "equal",
    ATEN.masked_select.default: "masked_select",
}


class DeviceMix(Exception):  # noqa: N818 - what is found
    """Tensors of two devices met in one operation."""


class _Module:
    """What torch asks of the module of a device."""

    def is_available(self) -> bool:
        """It is."""
        return True

    is_initialized = is_available

    def current_device(self) -> int:
        """The only one."""
        return 0

    def device_count(self) -> int:
        """One."""
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's generator is seeded already."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast may be asked for."""
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """Make the device known to torch; returns it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Module())
    # Casts are not what is looked for: products run in the dtype that they are given.
    global _LIBRARY  # noqa: PLW0603 - it lasts as long as it is held
    _LIBRARY = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    _LIBRARY.fallback(torch.library.fallthrough_kernel)
    return torch.device(NAME, 0)


_LIBRARY: Any = None


class FarTensor(torch.Tensor):
    """A tensor that says that it lies on the device."""

    here: torch.Tensor
    """Its numbers."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> FarTensor:
        """Be the tensor *here* on the device."""
        make: Any = torch.Tensor._make_wrapper_subclass
        far: FarTensor = make(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        far.here = here
        return far

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The tensor without its history; what is set has to be of the same dtype."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        assert (value.dtype, value.shape) == (self.dtype, self.shape)
        self.here = value.here

    def tolist(self) -> Any:
        """Its numbers, which torch gives of no subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `Far`")


class Far(TorchDispatchMode):
    """While it is entered there is a device `far`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """What a thread had to wait for while it was counted, as `why file function`."""
        self._counts = False

    def __enter__(self) -> Far:
        """Begin; `torch.tensor` makes its numbers on the CPU and moves them where they belong."""
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, given)) if isinstance(t, torch.Tensor)]
        far = {id(t.here): t for t in tensors if isinstance(t, FarTensor)}
        is_there = bool(far)
        if given.get("device") is not None:
            is_there = torch.device(given["device"]).type == NAME
            if is_there:
                given["device"] = torch.device("cpu")
        is_copy = func in (ATEN.copy_.default, ATEN._to_copy.default)
        if far and not is_copy:
            self._check(func, tensors)
        if far:
            self._count(func, tensors, is_copy=is_copy, stays=is_there)
        args, given = tree_map_only(FarTensor, lambda t: t.here, (args, given))
        found = func(*args, **given)
        if is_copy and func is ATEN.copy_.default:
            is_there = isinstance(tensors[0], FarTensor)
        if not is_there:
            return found

        def wrap(tensor: torch.Tensor) -> torch.Tensor:
            known = far.get(id(tensor))
            return FarTensor(tensor) if known is None else known

        return tree_map_only(torch.Tensor, wrap, found)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is waited for in here."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def _check(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """Refuse what CUDA refuses, and an index on the CPU, which it copies at every use."""
        here = [t for t in tensors if not isinstance(t, FarTensor) and t.device.type == "cpu"]
        if any(t.dim() for t in here):
            raise DeviceMix(f"{func} of {[(str(t.device), tuple(t.shape)) for t in tensors]}")

    def _count(self, func: Any, tensors: list[torch.Tensor], *, is_copy: bool, stays: bool) -> None:
        why = WAITS.get(func)
        if is_copy and not stays:
            why = "copy"
        if func in (ATEN.copy_.default,) and not isinstance(tensors[0], FarTensor):
            why = "copy"
        if func in (ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default):
            why = "mask" if any(t.dtype == torch.bool for t in tensors[1:]) else why
        if why is not None and self._counts:
            self.waits.append(f"{why} {_asker()}")


def _asker() -> str:
    """Return the innermost function of the product, which may have called a model's code."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename.removeprefix(ROOT + "/")
        if name != frame.filename and name.split("/")[0] in ("edge_sdk", "coordinator"):
            return f"{name} {frame.name}"
    return "?"
