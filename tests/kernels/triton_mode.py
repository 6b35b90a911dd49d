"""Where the Triton kernels run in the tests: on the GPU, else in Triton's interpreter.

Import this before any module with Triton kernels: they choose when they are defined.
"""

import math
import os
from typing import Any

import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

# Triton converts e4m3 from compute capability 8.9 on
HAS_E4M3 = not ON_GPU or torch.cuda.get_device_capability() >= (8, 9)
FP8_ON_DEVICE = [torch.float8_e5m2, *[torch.float8_e4m3fn] * HAS_E4M3]


def round_fp8_in_the_interpreter() -> None:
    """Let the interpreter round numbers to fp8 as GPUs do, which torch does too.

    Its own way lets a carry out of the fraction be lost.
    """
    from triton.runtime import interpreter

    own_way = interpreter._convert_float
    of_names = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}

    def convert(numbers: Any, of: Any, to: Any, rounding: Any) -> Any:
        if to.name not in of_names or of.name != "fp32":
            return own_way(numbers, of, to, rounding)
        rounded = torch.from_numpy(numbers).to(of_names[to.name])
        return rounded.view(torch.uint8).numpy()

    interpreter._convert_float = convert


if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    round_fp8_in_the_interpreter()

# what rounding weights to bfloat16 (7 bits of fraction) may change in the base 2 logarithm of
# their sum: half a step on a GPU, a whole one in the interpreter, which cuts digits off
BF16_LOG2_ERROR = math.log2(1 + 2 ** (-8 if ON_GPU else -7))
