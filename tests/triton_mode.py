"""Where the Triton kernels run in the tests: on the GPU, else in Triton's interpreter.

Import this before any module with Triton kernels: they choose when they are defined.
"""

import os

import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
