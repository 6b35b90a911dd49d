#!/usr/bin/env python3
"""Serve a model with HeteroCache, ask it about a long prompt, and show what happened to its KV.

usage: quickstart.py MODEL [--keep] [--gpu-budget X] [--prompt-chars N] [--port N]

Starts `vllm serve`, waits until it is healthy, asks through the `openai` client for a fact hidden
in some twenty thousand characters of Python documentation, reads /metrics meanwhile, and stops the
server (--keep leaves it running). The exit status says whether the answer was right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / ".cache" / "quickstart-server.log"
NUMBER = "48213"
FACT = f"The special magic number for Lisbon is: {NUMBER}."
QUESTION = "What is the special magic number for Lisbon? Answer with the number only."
KINDS = ("dense", "compact", "spare", "host")
PAGE_TOKENS = 16
START_LIMIT_S = 1800
ANSWER_TOKENS = 64  # enough decode steps to read the metrics while the request runs


class Sample(NamedTuple):
    """What /metrics said at one moment."""

    pages: dict[str, int]  # by kind
    used_blocks: int  # of vLLM's own pool


def long_prompt(num_chars: int) -> str:
    """Python's own reference text, with the fact in the middle and the question at the end."""
    from vllm_heterocache.evaluation.haystacks import prose

    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", prose()) if len(p.strip()) > 80]
    chosen: list[str] = []
    for paragraph in paragraphs:
        if sum(map(len, chosen)) + len(paragraph) > num_chars:
            break
        chosen.append(paragraph)
    chosen.insert(len(chosen) // 2, FACT)
    return "\n\n".join([*chosen, QUESTION])


def start_server(model: str, port: int, gpu_budget: float) -> subprocess.Popen:
    """Run `vllm serve` in a process group of its own, its output in LOG."""
    options = {"heterocache": {"gpu_budget": gpu_budget}}
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model]
    command += ["--attention-backend", "heterocache", "--additional-config", json.dumps(options)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "quickstart"]
    command += ["--max-model-len", "8192", "--enforce-eager"]
    if not torch.cuda.is_available():  # many CPUs multiply bf16 several times slower
        command += ["--dtype", "float32"]
    environment = dict(os.environ)
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; read on CPUs only
    print("$", shlex.join(["vllm", *command[1:]]), flush=True)
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def wait_until_healthy(server: subprocess.Popen, url: str) -> None:
    """Return once /health answers; exit with the end of the log if the server dies first."""
    started = told = time.monotonic()
    print(
        f"waiting for the server, whose log is {LOG}; the first start calibrates the model",
        flush=True,
    )
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            print(f"the server is up after {time.monotonic() - started:.0f} s", flush=True)
            return
        except (urllib.error.URLError, OSError):
            pass
        now = time.monotonic()
        if server.poll() is not None or now - started > START_LIMIT_S:
            print(LOG.read_text(errors="replace")[-4000:], file=sys.stderr)
            sys.exit(f"error: the server did not start; its whole log is {LOG}")
        if now - told > 30:
            told = now
            print(f"  ... {now - started:.0f} s  {progress()}", flush=True)
        time.sleep(1)


def progress() -> str:
    """The last that the server said of its calibration."""
    said = re.findall(r"HeteroCache calibrates: .*", LOG.read_text(errors="replace"))
    return said[-1] if said else ""


def read_metrics(url: str) -> tuple[Sample, list[str]]:
    """One sample, and the plugin's lines of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    # the client library adds the creation time of each counter
    ours = [line for line in lines if re.match(r"vllm:heterocache_\w+(?<!_created)\{", line)]
    pages = dict.fromkeys(KINDS, 0)
    for line in ours:
        found = re.match(r'vllm:heterocache_pages\{.*kind="(\w+)".*\} (\S+)', line)
        if found:
            pages[found[1]] += int(float(found[2]))
    text = "\n".join(lines)
    usage = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", text, re.MULTILINE)
    total = re.search(r'^vllm:cache_config_info\{.*num_gpu_blocks="(\d+)"', text, re.MULTILINE)
    blocks = int(total[1]) if total else 0
    used = round(float(usage[1]) * (blocks - 1)) if usage and blocks else 0
    return Sample(pages, used), ours


class Watcher(threading.Thread):
    """Reads /metrics all the time, because compaction takes one step of the engine."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._stop_asked = threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self._stop_asked.is_set():
            with contextlib.suppress(OSError):  # the server is busy; the next reading is soon
                self.samples.append(read_metrics(self._url)[0])
            time.sleep(0.02)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def ask(url: str, prompt: str) -> tuple[str, int, int, float]:
    """The answer, its prompt and completion tokens, and seconds to the first token."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    started, first, parts, usage = time.monotonic(), 0.0, [], None
    stream = client.chat.completions.create(
        model="quickstart",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"min_tokens": ANSWER_TOKENS},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - started
            parts.append(chunk.choices[0].delta.content)
    assert usage is not None
    return "".join(parts).strip(), usage.prompt_tokens, usage.completion_tokens, first


def report(before: Sample, samples: list[Sample], after: Sample, prompt_tokens: int) -> None:
    """Print the pages by phase, and the share of the prompt's KV that went back to vLLM's pool."""
    compacted = [sample for sample in samples if sample.pages["compact"]]
    prefill = max(samples, key=lambda sample: sample.pages["dense"], default=before)
    decode = compacted[len(compacted) // 2] if compacted else after
    phases = {"before": before, "prefill, most": prefill, "decoding": decode, "after": after}
    print("\nKV pages (16 tokens of one head), and blocks in use in vLLM's own pool:")
    print(f"{'':16}" + "".join(f"{kind:>9}" for kind in KINDS) + f"{'blocks':>9}")
    for name, sample in phases.items():
        numbers = [sample.pages[kind] for kind in KINDS] + [sample.used_blocks]
        print(f"{name:16}" + "".join(f"{number:9,}" for number in numbers))
    dense_blocks = -(-prompt_tokens // PAGE_TOKENS)
    if not compacted or not decode.used_blocks:
        print("No compacted request was seen: the prompt stayed dense.")
        return
    share = 1 - decode.used_blocks / dense_blocks
    print(
        f"\nThe prompt's {prompt_tokens:,} tokens fill {dense_blocks} blocks; while decoding, the "
        f"request holds {decode.used_blocks}: {share:.0%} of its KV memory was given back."
    )


def stop_server(server: subprocess.Popen) -> None:
    """Stop the server's process group: politely, then not."""
    for sign, patience in ((signal.SIGINT, 30), (signal.SIGTERM, 15), (signal.SIGKILL, 10)):
        if server.poll() is not None:
            return
        os.killpg(server.pid, sign)
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def show_answer(url: str, prompt: str) -> bool:
    """Ask, print answer and metrics, and say whether the answer was right."""
    before, _ = read_metrics(url)
    print(f"asking a question of {len(prompt):,} characters ...", flush=True)
    watcher = Watcher(url)
    watcher.start()
    answer, prompt_tokens, new_tokens, first = ask(url, prompt)
    watcher.stop()
    time.sleep(1)  # the last step's numbers
    after, lines = read_metrics(url)
    print("\nthe plugin's part of /metrics:\n  " + "\n  ".join(lines))
    print(
        f"\nprompt: {prompt_tokens:,} tokens of Python documentation with one fact inside: {FACT}"
    )
    print(f"question: {QUESTION}\nanswer ({new_tokens} tokens, the first after {first:.1f} s):")
    print("  " + answer.replace("\n", "\n  "))
    report(before, watcher.samples, after, prompt_tokens)
    right = NUMBER in answer
    print("The answer is right." if right else f"The answer is WRONG: it lacks {NUMBER}.")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder or name, as for `vllm serve`")
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    parser.add_argument("--gpu-budget", type=float, default=0.3, metavar="X", help="default: 0.3")
    parser.add_argument("--prompt-chars", type=int, default=20000, metavar="N")
    parser.add_argument("--port", type=int, metavar="N", help="default: a free one")
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port or free_port()}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the server ends, too
    server = start_server(args.model, int(url.rpartition(":")[2]), args.gpu_budget)
    keep = False
    try:
        wait_until_healthy(server, url)
        right = show_answer(url, long_prompt(args.prompt_chars))
        keep = args.keep
    finally:
        if not keep:
            stop_server(server)
    if keep:
        print(f"\nThe server keeps running at {url}/v1 (model `quickstart`, log {LOG});")
        print(f"stop it with: kill -INT -- -{server.pid}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
