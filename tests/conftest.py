"""Fixtures and marks that every test file may use."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton_mode  # noqa: F401  before anything imports Triton, which looks at the mode then

pytest_plugins = ["feature_page"]

# vLLM's log handler keeps the stream of the test that imported vLLM first, which pytest closes.
logging.raiseExceptions = False

# Engines here do not compile, but vLLM makes Inductor ask the CPU what it can do, with a few
# processes that import torch: twenty seconds of every first engine.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 199,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _has_gpu():
        _skip(items, "cpu_worker", "vLLM's CPU worker takes CUDA's streams from torch")
    else:
        _skip(items, "gpu", "no CUDA GPU here")


def _skip(items: list[pytest.Item], mark: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of tests share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def _own_profile_cache(shared_folder: Path):
    """Tests neither read nor fill the user's cache of head profiles.

    Processes of tests share one, because a calibration takes minutes.
    """
    if "HETEROCACHE_CACHE_DIR" in os.environ:
        yield
        return
    os.environ["HETEROCACHE_CACHE_DIR"] = str(shared_folder / "profiles")
    yield
    del os.environ["HETEROCACHE_CACHE_DIR"]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """`logged()`: what the plugin has logged so far in this test, without what vLLM logs."""

    def messages() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == "vllm.heterocache"]

    return messages


@pytest.fixture(scope="session")
def make_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`make(**changes)` writes a config.json for a tiny Llama with these values changed.

    There are no weights and no tokenizer: use load_format="dummy", skip_tokenizer_init=True.
    """

    def make(**changes: Any) -> str:
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, **changes}))
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model_folder: Callable[..., str]) -> str:
    """Folder of a Llama with 2 layers, 4 query and 2 KV heads of 16; no weights, no tokenizer."""
    return make_model_folder()


@pytest.fixture(scope="session")
def small_model() -> str:
    """Folder of SmolLM2-135M-Instruct (8K context), made by scripts/build_smollm2.py."""
    return _model_of("HETEROCACHE_TEST_MODEL", "scripts/test.sh builds it")


@pytest.fixture(scope="session")
def long_model() -> str:
    """Folder of SmolLM2-135M-128K, made by scripts/build_smollm2_128k.py."""
    return _model_of("HETEROCACHE_TEST_MODEL_128K", "scripts/test.sh builds it")


@pytest.fixture(scope="session")
def gemma_model() -> str:
    """Folder of Gemma 3 270M, made by scripts/build_gemma3.py."""
    return _model_of("HETEROCACHE_TEST_GEMMA3", "scripts/build_gemma3.py builds it")


def _model_of(variable: str, reason: str) -> str:
    path = os.environ.get(variable, "")
    if not (Path(path) / "config.json").is_file() or not path:
        pytest.skip(f"{variable} names no model folder ({reason})")
    return path
