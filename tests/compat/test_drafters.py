"""Which backend serves the layers of a draft model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.config import AttentionConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_heterocache.compat.backend_name import is_selected
from vllm_heterocache.compat.drafters import is_of_draft_model, name_drafter_backend

FLASH = AttentionBackendEnum.FLASH_ATTN


@pytest.fixture
def config() -> SimpleNamespace:
    """As the V2 model runner copies the engine's for a draft model."""
    draft = SimpleNamespace()
    return SimpleNamespace(
        model_config=draft,
        attention_config=AttentionConfig(backend="HETEROCACHE"),
        speculative_config=SimpleNamespace(
            method="draft_model", draft_model_config=draft, attention_backend=FLASH
        ),
    )


def test_a_draft_model_gets_the_drafters_backend_and_its_engine_keeps_its_own(config):
    engines = config.attention_config
    assert is_selected(config) and is_of_draft_model(config)
    name_drafter_backend(config)
    assert config.attention_config.backend is FLASH and not is_selected(config)
    assert is_selected(SimpleNamespace(attention_config=engines))


def test_the_engines_config_and_that_of_eagle_are_not_of_a_draft_model(config):
    config.speculative_config.method = "eagle"
    assert not is_of_draft_model(config)
    config.speculative_config.method = "draft_model"
    config.model_config = SimpleNamespace()
    assert not is_of_draft_model(config)
    config.speculative_config = None
    assert not is_of_draft_model(config)
