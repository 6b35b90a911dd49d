#!/usr/bin/env python3
"""Train the LoRA adapter that extends SmolLM2-135M-Instruct from 8K to 128K tokens.

The data are made up as training goes (recall_samples.py): facts in prose or in repeated noise.
The prose is a file of uint16 token ids of any English text, some millions of them; which text the
adapter in data/ saw is not recorded, so a new adapter has other weights and the same task.
That adapter took 20 minutes on one H200, in stages: shorter contexts first, a later stage goes on
from the adapter of the one before (--resume), and the last has --rope-theta 8e6 --max-tokens
131072. A step has 32,768 tokens, or one sample if that is longer.

    python scripts/train_long_context.py models/smollm2-135m prose.u16 OUT --seconds 600
    python scripts/train_long_context.py models/smollm2-135m prose.u16 OUT2 --seconds 600 \\
        --resume OUT --rope-theta 8e6 --max-tokens 131072 --mix 0.1 0.1 0.1 0.2 0.2 0.3
    python scripts/train_long_context.py models/smollm2-135m prose.u16 OUT --steps 2 --tiny

OUT gets adapter.safetensors (fp32, to resume from) and smollm2-128k-lora.safetensors.xz (bf16),
which build_smollm2_128k.py merges when it lies in scripts/data. --tiny runs on a CPU.
"""

from __future__ import annotations

import argparse
import lzma
import math
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_smollm2_128k import ADAPTER, SCALE
from recall_samples import QUESTION_WEIGHT, Sampler
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

RANK = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
MIX = (0.1, 0.2, 0.3, 0.4, 0.0, 0.0)  # share of the steps at each length
STEP_TOKENS = 32768
RATE, RESUMED_RATE, LEAST_RATE, WARM_UP_STEPS = 4e-4, 3e-4, 0.05, 20
PROSE_KEPT = 0.1  # of the tokens of least weight, which are nearly all
AHEAD, WORKERS, REPORT_STEPS = 30, 10, 25
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY_LENGTH = 4096
# bf16 numbers, whose first byte says more than the second
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1}]


class LoraLinear(torch.nn.Module):
    """A frozen linear layer and its trained update of rank RANK, which begins as zero."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_A = torch.nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = torch.nn.Linear(RANK, base.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + SCALE * self.lora_B(self.lora_A(x))


def add_adapter(model: PreTrainedModel, resume: Path | None) -> list[torch.nn.Parameter]:
    """Freeze the model, wrap its projections, and return what is trained."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in PROJECTIONS:
            setattr(model.get_submodule(parent), last, LoraLinear(layer))
    if resume:
        kept = load_file(resume / "adapter.safetensors")
        unknown = model.load_state_dict(kept, strict=False).unexpected_keys
        if unknown:
            raise SystemExit(f"--resume {resume}: the model has no {unknown[0]}")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The factors by name, fp32."""
    return {name: w.cpu() for name, w in model.state_dict().items() if ".lora_" in name}


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    """The base with the new RoPE, fp32; with --tiny a small one of random weights."""
    config = AutoConfig.from_pretrained(args.base, max_position_embeddings=args.max_tokens)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": args.rope_theta}
    if args.tiny:
        config.update(TINY)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        args.base, config=config, dtype=torch.float32, attn_implementation="sdpa"
    )


def hidden_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """[B, L - 1, hidden]: what predicts all tokens but the first."""
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]


def loss_of(
    model: PreTrainedModel, tokens: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Weighted mean loss of tokens [B, L], and the share of the values' tokens that are right."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        asked = weights[:, 1:] > 0
        hidden = hidden_states(model, tokens)[asked]
        target, weight = tokens[:, 1:][asked], weights[:, 1:][asked]
        keep = (weight >= QUESTION_WEIGHT) | (torch.rand_like(weight) < PROSE_KEPT)
        hidden, target, weight = hidden[keep], target[keep], weight[keep]
        logits = F.linear(hidden, model.lm_head.weight).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    is_value = weight == 1.0
    right = (logits.argmax(-1) == target)[is_value].float().mean().item()
    return (losses * weight).sum() / weight.sum(), right


def batch(sampler: Sampler, args: argparse.Namespace, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, L] int64 and weights [B, L] fp32 of one step."""
    r = random.Random(seed)
    length = TINY_LENGTH if args.tiny else r.choices(LENGTHS, args.mix)[0]
    count = 1 if args.tiny else max(1, STEP_TOKENS // length)
    samples = [sampler.sample(r, length) for _ in range(count)]
    tokens = np.array([sample.tokens for sample in samples])
    return tokens, np.array([sample.weights for sample in samples], dtype=np.float32)


def batches(sampler: Sampler, args: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Without end, made ahead by other processes."""
    if args.tiny:
        yield from (batch(sampler, args, args.seed + i) for i in range(args.steps))
        return
    with ProcessPoolExecutor(WORKERS) as pool:
        ahead = [pool.submit(batch, sampler, args, args.seed + i) for i in range(AHEAD)]
        try:
            for seed in range(args.seed + AHEAD, 1 << 62):
                yield ahead.pop(0).result()
                ahead.append(pool.submit(batch, sampler, args, seed))
        finally:
            for future in ahead:
                future.cancel()


def rate(step: int, progress: float, is_resumed: bool) -> float:
    """Warm-up, then a cosine down to LEAST_RATE of the highest rate."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    highest = RESUMED_RATE if is_resumed else RATE
    return highest * min(1.0, (step + 1) / WARM_UP_STEPS) * (cosine * (1 - LEAST_RATE) + LEAST_RATE)


def train(model: PreTrainedModel, sampler: Sampler, args: argparse.Namespace) -> list[float]:
    """Losses of all steps."""
    parameters = add_adapter(model, args.resume)
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    losses: list[float] = []
    rights: list[float] = []
    started = time.monotonic()
    for tokens, weights in batches(sampler, args):
        step, elapsed = len(losses), time.monotonic() - started
        progress = step / args.steps if args.steps else elapsed / args.seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, progress, args.resume is not None)
        placed = (torch.from_numpy(array).to(DEVICE) for array in (tokens, weights))
        loss, right = loss_of(model, *placed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        rights.append(right)
        if len(losses) % REPORT_STEPS == 0:
            latest = [statistics.mean(values[-REPORT_STEPS:]) for values in (losses, rights)]
            print("step {}: loss {:.3f}, right {:.3f}".format(len(losses), *latest), flush=True)
    return losses


def evaluate(model: PreTrainedModel, sampler: Sampler, length: int, count: int = 4) -> None:
    """Print how many of 16 facts a sample are right in every token, teacher-forced."""
    model.eval()
    for hay, is_listing in (("prose", False), ("noise", False), ("prose", True)):
        right: list[bool] = []
        for seed in range(count):
            sample = sampler.sample(
                random.Random(900000 + seed), length, is_evaluation=True, num_facts=16, form=0,
                hay=hay, is_listing=is_listing,
            )  # fmt: skip
            tokens = torch.tensor([sample.tokens], device=DEVICE)
            places = torch.tensor(sample.weights, device=DEVICE)[1:] == 1.0
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                logits = F.linear(hidden_states(model, tokens)[0, places], model.lm_head.weight)
            good = (logits.argmax(-1) == tokens[0, 1:][places]).tolist()
            right += runs(places.nonzero()[:, 0].tolist(), good)
        print(f"{length} tokens, {hay}{', listed' * is_listing}: {sum(right)}/{len(right)}")


def runs(places: list[int], good: list[bool]) -> list[bool]:
    """Whether all of each run of places that follow one another are good."""
    whole: list[bool] = []
    for i, (place, is_good) in enumerate(zip(places, good, strict=True)):
        if i and place == places[i - 1] + 1:
            whole[-1] &= is_good
        else:
            whole.append(is_good)
    return whole


def write(adapter: dict[str, torch.Tensor], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter.safetensors").write_bytes(save(adapter))
    half = save({name: weight.to(torch.bfloat16) for name, weight in adapter.items()})
    (out / ADAPTER.name).write_bytes(lzma.compress(half, lzma.FORMAT_XZ, filters=XZ))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("base", type=Path, help="folder that build_smollm2.py wrote")
    parser.add_argument("prose", type=Path, help="uint16 token ids")
    parser.add_argument("out", type=Path, help="folder to write")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--seconds", type=float, help="of training")
    limit.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--resume", type=Path, help="OUT of an earlier stage")
    parser.add_argument("--rope-theta", type=float, default=1e6)
    parser.add_argument("--max-tokens", type=int, default=65536)
    parser.add_argument("--mix", type=float, nargs=len(LENGTHS), default=MIX, help=str(LENGTHS))
    parser.add_argument("--list-share", type=float, default=0.5, help="of samples with a listing")
    parser.add_argument("--evaluate", type=int, nargs="*", default=[4096, 32768], help="lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a small random model; needs --steps")
    args = parser.parse_args(argv)
    if args.tiny and not args.steps:
        parser.error("--tiny needs --steps")
    return args


def main(argv: list[str] | None = None) -> list[float]:
    args = parse_args(argv)
    if DEVICE.type == "cpu" and not args.tiny:
        raise SystemExit("no GPU here; --tiny tries the script on a CPU")
    torch.manual_seed(args.seed)
    prose = np.fromfile(args.prose, dtype=np.uint16)
    sampler = Sampler(AutoTokenizer.from_pretrained(args.base), prose, args.list_share)
    model = load_model(args)
    losses = train(model, sampler, args)
    write(adapter_of(model), args.out)
    for length in args.evaluate:
        evaluate(model, sampler, length)
    return losses


if __name__ == "__main__":
    main()
