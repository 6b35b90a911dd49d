"""Compiles every Triton kernel for a GPU that need not be there (see check.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from common.kernel_profile import E4M3_CAPABILITY, KERNELS, launches, new_kernels

CPU = torch.device("cpu")
SHARED_KIB = {80: 163, 90: 227}  # most shared memory of a program, by compute capability
WIDE_COPY = re.compile(r"cp\.async\.cg\.shared\.global .*, 0x10\b")  # PTX: 16 bytes a thread


class AbsentDriver(CudaDriver):
    """What the compiler asks of a GPU, answered without one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_all(capability: int) -> Iterator[tuple[str, str, int]]:
    """Names, variants and wide copies of the kernels, each when it is compiled to machine code.

    Wide copies are the instructions that copy 16 bytes a thread to shared memory while the program
    goes on. A loop whose loads are pipelined has as many as its tiles need, for each stage.

    The kernels' own launch functions are called with tensors in host memory, and their launches
    end where the compiled kernel would run. Raises what the compiler raises, and AssertionError
    for a kernel that needs more shared memory than the GPU has.
    """
    triton.runtime.driver.set_active(AbsentDriver(capability))
    for function in KERNELS:
        launch = function.run
        function.run = lambda *args, launch=launch, **more: launch(
            *args, **{**more, "warmup": True}
        )
    calls = launches(CPU, num_programs=1, has_e4m3=divmod(capability, 10) >= E4M3_CAPABILITY)
    for name, variant, kernel in new_kernels(calls, device_index=0):
        assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024, name
        assert kernel.asm["cubin"], name
        yield name, variant, len(WIDE_COPY.findall(kernel.asm["ptx"]))
