import sys

import numpy as np
import pytest

from vllm_heterocache.commands.profile_report import prompt_budget, render, settings_line
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadRole
from vllm_heterocache.heads.pictures import save_picture
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity


def make_profile(num_layers: int, num_kv_heads: int) -> HeadProfile:
    rng = np.random.default_rng(3)
    shape = (num_layers, num_kv_heads)
    similarity = rng.random((3, *shape, num_kv_heads), np.float32)
    for d in range(3):
        similarity[d, max(0, num_layers - d) :] = np.nan
    model = ModelIdentity("some/model", "LlamaForCausalLM", num_layers, None, num_kv_heads, 64)
    return HeadProfile(model, {}, {}, *rng.random((2, *shape), np.float32), similarity)


def test_plan_spends_the_budget_to_the_page():
    profile, config = make_profile(30, 3), HeteroCacheConfig(gpu_budget=0.3)
    chosen = prompt_budget(profile, config, 10_000)
    assert chosen.num_pages == 625
    assert chosen.spare == 0
    assert chosen.budgets.sum() == 188 * 90  # ceil(0.3 * 625) blocks
    assert chosen.assignment.count(HeadRole.VOLATILE) == 14
    assert chosen.assignment.count(HeadRole.FINDER) == 8  # 0.09 * 90


def test_plan_of_satellites_sets_spare_pages_aside():
    profile, config = make_profile(30, 3), HeteroCacheConfig(gpu_budget=0.3, finder_share=0)
    chosen = prompt_budget(profile, config, 10_000)
    assert chosen.spare > 0
    assert chosen.budgets.sum() + chosen.spare == 188 * 90
    assert chosen.assignment.count(HeadRole.PIVOT) == 14


def test_plan_of_a_short_prompt_keeps_everything():
    profile = make_profile(30, 3)
    chosen = prompt_budget(profile, HeteroCacheConfig(min_prompt_tokens=2000), 1999)
    assert (chosen.budgets == 124).all() and chosen.spare == 0
    assert chosen.smallest_tokens == 2000
    assert (
        prompt_budget(profile, HeteroCacheConfig(min_prompt_tokens=2000), 2000).budgets.min() < 125
    )


@pytest.mark.parametrize(
    ("options", "role"), [({}, HeadRole.FINDER), ({"finder_share": 0}, HeadRole.SATELLITE)]
)
def test_a_short_prompt_sends_nothing_to_the_host(options, role):
    profile, config = make_profile(30, 3), HeteroCacheConfig(min_prompt_tokens=2000, **options)
    short, long = (render(profile, config, num_tokens) for num_tokens in (1999, 2000))
    assert "host: 0 pages (0.0% of the KV)" in short
    led = prompt_budget(profile, config).assignment.count(role)
    assert led and f"host: {led * 125} pages ({led / 90:.1%} of the KV)" in long


def test_plan_raises_short_prompts_to_what_the_floor_allows():
    chosen = prompt_budget(
        make_profile(30, 3), HeteroCacheConfig(min_prompt_tokens=1, full_share=0.9), 64
    )
    assert chosen.smallest_tokens > 1000
    assert (chosen.budgets == 4).all()


@pytest.mark.parametrize("shape", [(30, 3), (5, 32)], ids=str)
def test_table_has_a_line_per_layer_and_totals(shape):
    profile, config = make_profile(*shape), HeteroCacheConfig()
    assignment = prompt_budget(profile, config, 8192).assignment
    lines = render(profile, config, num_tokens=8192).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer")) + 1
    for layer in range(shape[0]):
        number, letters, kept = lines[start + layer].split()[:3]
        assert int(number) == layer and kept.endswith("%")
        assert letters == "".join(HeadRole(r).name[0] for r in assignment.roles[layer].tolist())
    text = "\n".join(lines[start + shape[0] :])
    for role in HeadRole:
        assert f"{assignment.count(role)} {role.name.lower()}" in text
    assert f"take {assignment.floor:.4f} of the pages" in text
    assert "blocks: 154 compact instead of 512" in text
    assert "fewer than 1024 tokens stay dense" in text


def test_table_lists_the_satellites_of_each_pivot():
    profile, config = make_profile(30, 3), HeteroCacheConfig(finder_share=0)
    sizes = prompt_budget(profile, config).assignment.cluster_sizes()
    text = render(profile, config)
    assert sizes.any() and "clusters (pivot: satellites)" in text
    assert "clusters" not in render(profile, HeteroCacheConfig()), "finders lead nobody else"
    for layer, head in np.argwhere(sizes > 0).tolist():
        assert f"{layer}.{head}: {sizes[layer, head]}" in text


def test_table_of_a_full_budget():
    text = render(make_profile(4, 2), HeteroCacheConfig(gpu_budget=1.0), num_tokens=1600)
    assert "100.0% of 800" in text and "at least" not in text


def test_impossible_options_are_refused_as_at_start_up():
    config = HeteroCacheConfig(recipe="paper", gpu_budget=0.05)
    with pytest.raises(ValueError, match=r"gpu_budget 0\.05"):
        render(make_profile(6, 4), config)


@pytest.mark.parametrize("shape", [(30, 3), (80, 8), (3, 32), (1, 1)], ids=str)
def test_picture_is_written(tmp_path, shape):
    pytest.importorskip("matplotlib")
    profile = make_profile(*shape)
    chosen = prompt_budget(profile, HeteroCacheConfig(gpu_budget=1.0 if shape == (1, 1) else 0.3))
    path = tmp_path / "roles.png"
    save_picture(profile, chosen.assignment, chosen.budgets, path, "settings")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    profile = make_profile(5, 3)
    chosen = prompt_budget(profile, HeteroCacheConfig())
    with pytest.raises(ImportError, match=r"roles\.png needs matplotlib.*pip install matplotlib"):
        save_picture(profile, chosen.assignment, chosen.budgets, tmp_path / "roles.png", "settings")


def test_title_of_a_picture_tells_where_its_budgets_come_from(tmp_path):
    pytest.importorskip("matplotlib")
    profile, config = make_profile(5, 3), HeteroCacheConfig(gpu_budget=0.25)
    chosen = prompt_budget(profile, config, 8000)
    settings = settings_line(config, chosen, 8000)
    for fact in ("retrieval", "gpu_budget 0.25", "8000 tokens"):
        assert fact in settings
    # a picture whose text stays text
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_picture(profile, chosen.assignment, chosen.budgets, tmp_path / "p.svg", settings)
    assert settings in (tmp_path / "p.svg").read_text()
