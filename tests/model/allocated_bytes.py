"""The memory that operations take, counted without a device."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocatedBytes(TorchDispatchMode):
    """The most bytes that tensors of a device had at a time, of those made meanwhile."""

    def __init__(self, device: torch.device, *before: torch.Tensor) -> None:
        """`before`: tensors that there are already, and that stay."""
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._living = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._living:
            self._living.add(address)
            self.now += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._living.remove(address)
        self.now -= size
