"""Host values on their way to the device, none of which the host waits for."""

from __future__ import annotations

import itertools

import numpy as np
import torch


class StagedTensor:
    """An int32 device tensor that keeps its address, and the pinned buffers it is filled from.

    A buffer is written again after `depth` writes, at most one a step. The host is never as many
    steps ahead of the device: vLLM keeps `max_concurrent_batches` in flight, and what a step writes
    after its forward pass may still be pending when its output is there. So a copy never reads a
    later value.
    """

    def __init__(self, size: int, depth: int, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=torch.int32, device=device)
        pin = device.type != "cpu"
        buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(depth)]
        self._buffers = itertools.cycle([(buffer, buffer.numpy()) for buffer in buffers])

    def write(self, values: np.ndarray) -> None:
        """Set all elements; the device sees them in stream order."""
        buffer, elements = next(self._buffers)
        elements[:] = values.ravel()
        self.tensor.copy_(buffer, non_blocking=True)


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of host values on the device, made without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def exclusive_sum(counts: np.ndarray) -> np.ndarray:
    """Of each element the sum of those before it, in the same shape."""
    flat = counts.ravel().astype(np.int64)
    return (np.cumsum(flat) - flat).reshape(counts.shape)
