"""The same stage of all replicas: what each has found is added up, in the same order everywhere.

The processes talk to each other directly, by torch.distributed: gloo on the CPU, NCCL on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import distributed as dist

from edge_sdk.errors import EdgeError

# Numbers that are exchanged at once: each process holds as many of every replica's.
AT_ONCE = 1 << 24
# Replicas come to the exchange together, when all waves of a step are done.
TIMEOUT = timedelta(seconds=120)


class StageLost(EdgeError):
    """An actor, or what it held, is gone: the step has to be done again."""


class ReplicaGroup:
    """This process's place among the replicas of its stage."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        """Meet the others at *store*; returns when all are there.

        Raises:
            StageLost: one of them did not come.
        """
        # Two processes of one GPU have no NCCL; they are as near as it gets.
        is_alone = device.type == "cuda" and os.environ.get("EDGESPLIT_SHARES_GPU") != "1"
        self._device = device if is_alone else torch.device("cpu")
        self._size = size
        backend = "nccl" if is_alone else "gloo"
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
            )
        except (RuntimeError, ValueError) as error:
            raise StageLost(f"the replicas did not meet: {error}") from error

    def add_up(self, found: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the sum over the replicas of each tensor, the same bits in all of them.

        Args:
            found: As many as the others have, of the same shapes and dtype where they are there;
                None where a replica has nothing to add. None comes back where nobody has.

        Raises:
            StageLost: one of the replicas is gone.
        """
        try:
            return self._add_up(found)
        except RuntimeError as error:  # what torch.distributed raises, whatever has happened
            raise StageLost(f"a replica is gone: {error}") from error

    def _add_up(self, found: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        sizes = torch.tensor([-1 if t is None else t.numel() for t in found], device=self._device)
        each = self._gather(sizes)
        most = torch.stack(each).max(0).values.tolist()
        parts = [
            torch.zeros(size, device=self._device)
            if tensor is None
            else tensor.detach().flatten().to(self._device, torch.float32)
            for tensor, size in zip(found, most, strict=True)
            if size >= 0
        ]
        if not parts:
            return [None] * len(found)
        flat = torch.cat(parts)
        for stretch in torch.split(flat, AT_ONCE):
            everybody = self._gather(stretch)
            stretch.copy_(everybody[0])
            for other in everybody[1:]:
                stretch.add_(other)
        sums = iter(torch.split(flat, [size for size in most if size >= 0]))
        return [None if size < 0 else next(sums) for size in most]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return what each replica has, in their order."""
        each = [torch.empty_like(tensor) for _ in range(self._size)]
        dist.all_gather(each, tensor.contiguous())
        return each

    def close(self) -> None:
        """Leave the others."""
        dist.destroy_process_group()


_tcp_store: Any = getattr(dist, "TCPStore", None)  # absent where torch was built without it


def open_store(host: str) -> Any:
    """Return a place on this machine at which the replicas meet; its port says where."""
    return _tcp_store(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


def find_store(host: str, port: int) -> Any:
    """Return the place that another process has opened.

    Raises:
        StageLost: it is gone.
    """
    try:
        return _tcp_store(host, port, is_master=False, timeout=TIMEOUT)
    except RuntimeError as error:
        raise StageLost(f"the place to meet is gone: {error}") from error


def use_interface(host: str) -> None:
    """Let gloo and NCCL talk over the interface that has the address *host*."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
