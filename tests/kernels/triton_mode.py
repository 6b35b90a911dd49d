"""Where the Triton kernels run in the tests: on the GPU, else in Triton's interpreter.

Import this before any module with Triton kernels: they choose when they are defined.
"""

import math
import os

import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# what rounding weights to bfloat16 (7 bits of fraction) may change in the base 2 logarithm of
# their sum: half a step on a GPU, a whole one in the interpreter, which cuts digits off
BF16_LOG2_ERROR = math.log2(1 + 2 ** (-8 if ON_GPU else -7))
