"""What the documents promise is what the code does."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from vllm_heterocache import metrics
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.policies import POLICIES, make_policy

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "kernels" / "README.md", *ROOT.glob("docs/*.md")])


def table_rows(path: Path) -> dict[str, list[str]]:
    """First cell (without backquotes) -> other cells of the first table row that has it."""
    rows = {}
    for line in path.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(cells[0].strip("`"), cells[1:])
    return rows


def test_every_option_is_documented_with_its_default():
    rows = table_rows(ROOT / "docs" / "options.md")
    for name, default in dataclasses.asdict(HeteroCacheConfig()).items():
        assert json.loads(rows[name][0]) == default, name


def test_every_policy_is_documented_with_its_options_and_their_defaults():
    rows = table_rows(ROOT / "docs" / "policies.md")
    inherited = dataclasses.asdict(make_policy(HeteroCacheConfig(policy="snapkv")))
    for name in POLICIES:
        policy = make_policy(HeteroCacheConfig(policy=name, gpu_budget=1.0))
        cell = rows[name][2]
        for option, default in dataclasses.asdict(policy).items():
            if "as `snapkv`" not in cell or inherited.get(option) != default:
                assert f"`{option}` {json.dumps(default).removesuffix('.0')}" in cell, name


def test_every_metric_is_documented():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in [*metrics.COUNTERS, "decode_rows"]:
        assert f"vllm:heterocache_{name}_total" in text
    for kind in metrics.PAGE_KINDS:
        assert f'vllm:heterocache_pages{{kind="{kind}"}}' in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.name)
def test_shipped_configuration_is_valid(path):
    options = yaml.safe_load(path.read_text())
    assert options["attention-backend"] == "heterocache"
    HeteroCacheConfig.from_additional_config(options["additional-config"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_document_names_exist(path):
    text = path.read_text()
    links = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    for link in filter(None, links):
        assert (path.parent / link).exists(), link
    places = [ROOT, ROOT / "vllm_heterocache", path.parent]
    names = re.findall(r"`([\w/.-]+\.(?:py|sh|yaml|md))`", text)
    for name in names:
        assert any((place / name).exists() for place in places), name


def test_measured_rows_say_how_they_were_made():
    for path in ROOT.glob("docs/results/*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert {"benchmark", "date", "commit", "device", "versions", "config"} <= row.keys()
