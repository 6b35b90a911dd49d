"""Runs one small case of every Triton kernel against its reference, on the current GPU.

    python scripts/bench/check.py                                 # exit code 1: a wrong result
    python scripts/bench/check.py --sanitize memcheck racecheck   # under compute-sanitizer
    python scripts/bench/check.py --profile                       # registers, spills, occupancy
    python scripts/bench/check.py --compile 90                    # for sm_90, without any GPU

With TRITON_INTERPRET=1 the cases run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import glob
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
WRONG_RESULT, UNUSABLE, FOUND = 1, 3, 9  # exit codes
REFUSED = "Device not supported"  # said on virtual machines that hide the GPU's debugger
NEEDS_GPU = "no CUDA GPU here (or TRITON_INTERPRET=1 is set)"
MAX_LINES = 60


def check(seed: int, only_first: bool = False) -> int:
    """`only_first`: one check a kernel, whose name is the first word of the check's."""
    import torch
    from kernel_checks import ON_GPU, all_checks

    print(torch.cuda.get_device_name() if ON_GPU else "Triton's interpreter", f"(seed {seed})")
    torch.set_num_threads(1)
    failed, seen = 0, set()
    for name, run in all_checks():
        kernel = name.split()[0].strip(",")
        if only_first and kernel in seen:
            continue
        seen.add(kernel)
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            error = run()
        except AssertionError as mismatch:
            failed += 1
            text = " ".join(str(mismatch).split())
            print(f"{name:44} WRONG: {text}", flush=True)
        else:
            result = f"max error {error:.1e}" if error else "equal"
            print(f"{name:44} {result}", flush=True)
    return WRONG_RESULT if failed else 0


def find_sanitizer() -> str | None:
    """In PATH, else where CUDA, NVIDIA's Python packages and Triton keep their programs."""
    if path := shutil.which("compute-sanitizer"):
        return path
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [home for home in homes if home] + sorted(glob.glob("/usr/local/cuda*"), reverse=True)
    folders = [f"{home}/{place}" for home in homes for place in ("bin", "compute-sanitizer")]
    for site in sys.path:
        folders += sorted(glob.glob(f"{site}/nvidia/*/bin"))
        folders += sorted(glob.glob(f"{site}/nvidia/*/compute-sanitizer"))
        folders.append(f"{site}/triton/backends/nvidia/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitize(tools: list[str], seed: int) -> int:
    """Run the cases again under each tool; the worst exit code."""
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_GPU, file=sys.stderr)
        return UNUSABLE
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer is neither in PATH nor in a CUDA folder: install the CUDA toolkit",
            file=sys.stderr,
        )
        return UNUSABLE
    codes = [_sanitize(sanitizer, tool, seed) for tool in tools]
    return next((code for code in (FOUND, WRONG_RESULT, UNUSABLE) if code in codes), 0)


def _sanitize(sanitizer: str, tool: str, seed: int) -> int:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, str(Path(__file__).resolve()), "--seed", str(seed)]
    # each tensor its own allocation, so that what lies behind it is out of bounds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    begin = time.monotonic()
    result = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = time.monotonic() - begin
    if REFUSED in result.stdout:
        print(f"{tool}: compute-sanitizer refuses this GPU: {REFUSED}", file=sys.stderr)
        return UNUSABLE
    summaries = [line for line in result.stdout.splitlines() if "SUMMARY" in line]
    if result.returncode == 0 and summaries:
        print(f"{tool}: {summaries[-1].strip('= ')} ({seconds:.0f} s)", flush=True)
        return 0
    code = FOUND if result.returncode == FOUND else WRONG_RESULT
    what = "errors found" if code == FOUND else f"exit code {result.returncode}"
    lines = result.stdout.splitlines()
    print(*lines[:MAX_LINES], sep="\n")
    if len(lines) > MAX_LINES:
        print("...", *lines[max(MAX_LINES, len(lines) - 20) :], sep="\n")
    print(f"{tool}: {what} ({seconds:.0f} s)", flush=True)
    return code


def profile() -> int:
    import torch

    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        print(NEEDS_GPU, file=sys.stderr)
        return UNUSABLE
    from common.kernel_profile import print_profile

    print_profile()
    return 0


def compile_for(capability: int) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    from common.kernel_compile import compile_all

    for name, variant, wide_copies in compile_all(capability):
        print(f"{name:30}{variant:32}{wide_copies:4}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--sanitize", nargs="+", choices=TOOLS, metavar="TOOL", help=str(TOOLS))
    modes.add_argument("--profile", action="store_true", help="print a Markdown table")
    modes.add_argument("--compile", type=int, choices=[80, 90], help="compute capability, times 10")
    parser.add_argument("--first", action="store_true", help="one check a kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    args = parser.parse_args()
    if args.sanitize:
        return sanitize(args.sanitize, args.seed)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]
    sys.path[1:1] = [str(ROOT / "tests" / "model"), str(ROOT / "scripts" / "bench")]
    if args.compile:
        return compile_for(args.compile)
    return profile() if args.profile else check(args.seed, args.first)


if __name__ == "__main__":
    sys.exit(main())
