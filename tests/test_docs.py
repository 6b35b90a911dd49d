"""What the documents promise is what the code does."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vllm_heterocache import metrics
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.policies import POLICIES, make_policy
from vllm_heterocache.startup.capacity import steady_state_requests
from vllm_heterocache.worker.tables.finder_keys import FinderKeys
from vllm_heterocache.worker.tables.head_maps import head_maps
from vllm_heterocache.worker.tables.page_table import PageTable

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), ROOT / "kernels" / "README.md", *ROOT.glob("docs/*.md")])


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


def test_every_documented_option_exists():
    text = (ROOT / "docs" / "options.md").read_text()
    table = text.split("| option | default | meaning |")[1].split("\n\n")[0]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(documented) == sorted(dataclasses.asdict(HeteroCacheConfig()))


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


# Layers, KV heads, head size and query heads of a KV head of the models in docs/choose_options.md;
# 16-bit elements
WORKED_MODELS = {"Llama-3.1-8B": (32, 8, 128, 4), "SmolLM2-135M": (30, 3, 64, 3)}


def worked_rows() -> list[list[str]]:
    """Cells of the rows under "Worked numbers" in docs/choose_options.md."""
    text = (ROOT / "docs" / "choose_options.md").read_text().split("\n## Worked numbers")[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(tuple(f"| {name}" for name in WORKED_MODELS))
    ]
    assert len(rows) == 10
    return rows


def worked_roles(num_layers: int, num_kv_heads: int, config: HeteroCacheConfig) -> HeadAssignment:
    """Roles of a model whose heads all resemble one another and have a pivot near by."""
    scores = np.zeros((num_layers, num_kv_heads), np.float32)
    scores[:, 0] = 0.5
    scores[::3, 0] = 1.0
    profile = HeadProfile(
        ModelIdentity("worked", "Worked", num_layers, num_kv_heads, num_kv_heads, 64),
        {"top_share": 0.2},
        {},
        retrieval=scores,
        similarity=np.ones((3, num_layers, num_kv_heads, num_kv_heads), np.float32),
    )
    return configured_heads(profile, config)


def table_bytes(
    assignment: HeadAssignment, head_dim: int, group: int, config: HeteroCacheConfig
) -> int:
    """What a block of the pool gives up for the page tables on CUDA."""
    maps = head_maps(assignment, torch.device("cpu"))
    keys = FinderKeys.of(assignment, head_dim, torch.bfloat16)
    share = make_policy(config).biased_share(config)
    return PageTable.bytes_per_block(maps, group, config.gpu_budget, share, keys)


@pytest.mark.parametrize("row", worked_rows(), ids=lambda row: " ".join(row[:4]))
def test_worked_numbers_are_those_of_the_package(row):
    num_layers, num_kv_heads, head_dim, group = WORKED_MODELS[row[0].split(",")[0]]
    of_stock, tokens = (int(cell.replace(",", "")) for cell in row[1:3])
    gpu_budget = float(row[3])
    config = HeteroCacheConfig(gpu_budget=gpu_budget)
    assignment = worked_roles(num_layers, num_kv_heads, config)
    page_bytes = PAGE_SIZE * 2 * head_dim * 2
    block_bytes, blocks = page_bytes * assignment.num_heads, of_stock
    if "CPU" not in row[0]:
        tables = table_bytes(assignment, head_dim, group, config)
        blocks = of_stock * block_bytes // (block_bytes + tables)
    requests, _ = steady_state_requests(blocks, tokens, gpu_budget, PAGE_SIZE)
    _, stock = steady_state_requests(of_stock, tokens, gpu_budget, PAGE_SIZE)
    host_pages = assignment.num_led * (tokens // PAGE_SIZE)
    assert row[4:] == [
        f"{blocks:,}",
        f"{-(-tokens // PAGE_SIZE):,}",
        f"{compact_blocks(tokens, gpu_budget):,}",
        str(requests),
        str(stock),
        f"{host_pages * page_bytes / 2**30:.2f}",
    ]


def test_the_laptop_pool_is_that_of_the_quickstart():
    num_layers, num_kv_heads, head_dim, _ = WORKED_MODELS["SmolLM2-135M"]
    block_bytes = 2 * num_layers * num_kv_heads * head_dim * PAGE_SIZE * 2
    (blocks,) = {row[1] for row in worked_rows() if row[0].startswith("SmolLM2")}
    quickstart = (ROOT / "scripts" / "quickstart.py").read_text()
    (gib,) = re.findall(r'"VLLM_CPU_KVCACHE_SPACE", "(\d+)"', quickstart)
    assert blocks == f"{int(gib) * 2**30 // block_bytes:,}"


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


def section_names(path: Path) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_sections_that_a_document_links_exist(path):
    for link, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text()):
        assert section in section_names(path.parent / link if link else path), f"{link}#{section}"


def test_measured_rows_say_how_they_were_made():
    for path in ROOT.glob("docs/results/*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert {"benchmark", "date", "commit", "device", "versions", "config"} <= row.keys()
