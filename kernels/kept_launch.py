"""A launch that is made again and again with the same arguments.

Triton looks at every argument of every launch, to find the kernel that it compiled for such ones.
That and what torch and the driver are asked about each tensor take the host longer than the launch
itself. The same arguments always find the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch


class KeptLaunch:
    """A kernel and its arguments; call it with a grid. Tensors keep their memory as long as it
    lives.

    The first call launches as Triton does. Later ones give the compiled kernel the addresses that
    the tensors had then, so tensors must not move, and only what they hold may change.
    """

    def __init__(self, kernel: Any, *arguments: Any, num_warps: int, **constants: Any) -> None:
        """
        Args:
            kernel: a function of `triton.jit`.
            arguments: its first arguments, tensors and numbers.
            num_warps: of a program.
            constants: the others, all `tl.constexpr`.
        """
        self._kernel, self._arguments = kernel, arguments
        self._num_warps, self._constants = num_warps, constants
        self._compiled: Any = None  # Triton's interpreter compiles nothing
        self._values: list[Any] = []

    def __call__(self, *grid: int) -> None:
        """Launch so many programs on the current stream; nothing where one of the sizes is 0."""
        if 0 in grid:
            return
        if self._compiled is not None:
            self._compiled[(*grid, 1, 1)[:3]](*self._values)
            return
        self._compiled = self._kernel[grid](
            *self._arguments, **self._constants, num_warps=self._num_warps
        )
        if self._compiled is not None:
            names = self._kernel.arg_names[len(self._arguments) :]
            self._values = [_address(a) for a in self._arguments]
            self._values += [self._constants[name] for name in names]


def _address(argument: Any) -> Any:
    """Of a tensor on the GPU its address, which is what kernels get. The driver knows by which
    address the GPU reads pinned host memory, so such a tensor stays one."""
    is_on_gpu = isinstance(argument, torch.Tensor) and argument.is_cuda
    return argument.data_ptr() if is_on_gpu else argument
