"""The KV-cache groups of layers that slide over a window, beside the group that is compacted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from kv_groups import (
    DTYPE,
    MIN_TOKENS,
    PAGE,
    WINDOW,
    Cache,
    check_groups,
    check_refused,
    hetero_spec,
)

from vllm_heterocache.compat import SlidingWindowSpec
from vllm_heterocache.compat.other_groups import expected_groups, other_group

SLIDING = 100  # tokens
IN_WINDOW = -(-(SLIDING - 1) // PAGE) + 1  # blocks that a window of a request can touch


class Model(NamedTuple):
    full: int  # layers
    sliding: int
    num_kv_heads: int
    head_size: int
    sliding_kv_heads: int | None = None  # where they are others


def sliding_spec(num_kv_heads: int, head_size: int, window: int = SLIDING) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=PAGE,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=DTYPE,
        sliding_window=window,
    )


def specs_of(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """By name: those of layers with full attention, and of layers that slide."""
    heads = model.sliding_kv_heads or model.num_kv_heads
    full = {
        f"full.{i}": hetero_spec(model.num_kv_heads, model.head_size) for i in range(model.full)
    }
    return full, {f"slide.{i}": sliding_spec(heads, model.head_size) for i in range(model.sliding)}


@pytest.mark.parametrize(
    ("model", "num_groups"),
    [
        pytest.param(Model(3, 15, 1, 256), 5, id="gemma-3-270m"),
        pytest.param(Model(4, 22, 1, 256), 6, id="gemma-3-1b"),
        pytest.param(Model(10, 52, 16, 128), 6, id="gemma-3-27b"),
        pytest.param(Model(12, 12, 8, 64), 1, id="gpt-oss-20b"),
        pytest.param(Model(8, 24, 32, 128), 3, id="olmo-3-7b"),
        pytest.param(Model(16, 48, 8, 128), 3, id="exaone-4-32b"),
        pytest.param(Model(9, 8, 8, 128), 1, id="one-more-that-is-full"),
        pytest.param(Model(9, 30, 4, 128, 8), 8, id="sliding-pages-twice-as-large"),
        pytest.param(Model(9, 30, 8, 128, 4), 2, id="sliding-pages-half-as-large"),
    ],
)
def test_vllm_makes_one_group_of_the_full_layers_that_fills_a_block(model, num_groups):
    full, sliding = specs_of(model)
    check_groups(full, sliding, num_groups)


@pytest.mark.feature("Few sliding layers among full ones", refused=True)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        pytest.param(Model(12, 4, 8, 64), "puts 4 of its 12 layers", id="more-full"),
        pytest.param(Model(9, 12, 8, 64), "blocks of 393,216 bytes", id="a-few-more-sliding"),
        pytest.param(Model(2, 6, 1, 64, 8), "blocks of 32,768 bytes", id="wider-sliding-layer"),
    ],
)
def test_other_mixtures_are_refused_in_one_sentence(model, words):
    full, sliding = specs_of(model)
    check_refused(full, sliding, words)


@pytest.fixture(params=[False, True], ids=["full-last", "full-first"])
def cache(request) -> Cache:
    """Of one group with full attention and two that slide."""
    sliding, full = [sliding_spec(2, 64)] * 2, [hetero_spec(2, 64)]
    return Cache([*full, *sliding] if request.param else [*sliding, *full])


def test_compaction_gives_back_full_blocks_and_windows_what_slid_out(cache):
    request = cache.request("a", 330)
    assert cache.prefill(request) == 0
    (compact,) = {len(cache.manager.compact_blocks)}
    assert compact == 5  # a quarter of 20 full pages
    assert cache.used == 3 * 21 + compact
    cache.compact(request)
    for step in range(40):
        cache.decode(request)
        if step == 0:
            continue  # blocks are given back with the next allocation
        table = cache.table(cache.manager, request)
        assert table[:20] == [0] * 20 and all(table[20:])
        in_windows = [sum(map(bool, cache.table(other, request))) for other in cache.others]
        # and the block of the drafts that `decode` leaves room for
        assert all(kept <= IN_WINDOW + 1 for kept in in_windows)
        assert cache.used == compact + len(table) - 20 + sum(in_windows)
    cache.kv.free(request)
    cache.check()
    assert cache.used == 0


def test_the_prefix_cache_leaves_what_the_policy_observes(cache):
    """The longest hit that policy and stock vLLM allow, in all groups at once."""
    first = cache.request("first", 600)
    cache.prefill(first)
    cache.kv.free(first)
    for num_tokens in range(200, 600, 7):
        hit = cache.kv.get_computed_blocks(cache.request(f"again{num_tokens}", num_tokens))[1]
        left = WINDOW if num_tokens >= MIN_TOKENS else 1
        assert hit == (num_tokens - left) // PAGE * PAGE


@pytest.mark.parametrize("first_end", [None, 256, 592], ids=str)
@pytest.mark.parametrize("num_tokens", [*range(600, 617), 299, 300])
def test_windows_keep_what_hits_need_that_leave_what_is_observed(num_tokens, first_end):
    """vLLM keeps by itself what a hit at the prompt's end needs, and ours end before."""
    cache = Cache([*[sliding_spec(2, 64)] * 2, hetero_spec(2, 64)], retention_interval=0)
    first = cache.request("first", num_tokens)
    cache.prefill(first, first_end)
    cache.kv.free(first)

    def hit(num_more: int) -> int:
        again = cache.request(f"and {num_more}", num_tokens, list(range(9000, 9000 + num_more)))
        return cache.kv.get_computed_blocks(again)[1]

    at_end = (num_tokens - 1) // PAGE * PAGE
    for num_more in (0, 1, 5, 17, WINDOW - 1, WINDOW, 200):
        left = WINDOW if num_tokens + num_more >= MIN_TOKENS else 1
        assert hit(num_more) == min(at_end, (num_tokens + num_more - left) // PAGE * PAGE)


@pytest.mark.parametrize("window", [17, SLIDING], ids=str)
def test_questions_behind_one_text_find_it_whatever_their_length(window):
    """The second one shows what is shared. Shorter ones leave more of that to be computed."""
    cache = Cache([sliding_spec(2, 64, window), hetero_spec(2, 64)], retention_interval=0)
    shared, hits = 400, []
    for number, length in enumerate((39, 20, 8, 1, 30)):
        question = list(range(9000 + 100 * number, 9000 + 100 * number + length))
        request = cache.request(f"question {number}", shared, question)
        hits.append(cache.prefill(request))
        cache.kv.free(request)
    assert hits[:2] == [0, 0]
    assert min(hits[2:]) >= (shared - 2 * WINDOW) // PAGE * PAGE


@pytest.mark.parametrize("prompt", [MIN_TOKENS - 60, MIN_TOKENS], ids=["dense", "compacted"])
def test_no_group_publishes_what_a_compacted_prompt_generates(cache, prompt):
    """A later prompt goes on as the first request did: it computes its tokens itself, and finds
    none of the first one's among those that it makes prefix cache."""
    first = cache.request("first", prompt)
    cache.prefill(first)
    if prompt == MIN_TOKENS:
        cache.compact(first)
    generated = list(range(7000, 7090))
    for token in generated:
        cache.decode(first, token)
    published = [other.num_cached_block[first.request_id] for other in cache.others]
    is_compacted = prompt == MIN_TOKENS
    # the last token that was generated is computed in the next step
    expected = (prompt if is_compacted else prompt + len(generated) - 1) // PAGE
    assert published == [expected] * 2
    assert cache.manager.num_cached_block[first.request_id] == expected
    again = cache.request("again", prompt, generated)
    assert cache.kv.get_computed_blocks(again)[1] <= expected * PAGE


def test_what_a_group_keeps_of_a_request_is_known_before(cache):
    model = SimpleNamespace(
        max_model_len=4096,
        hf_text_config=SimpleNamespace(layer_types=["sliding_attention"] * 4 + ["global"] * 2),
        get_sliding_window=lambda: SLIDING,
        get_total_num_hidden_layers=lambda: 6,
        get_head_size=lambda: 64,
        dtype=DTYPE,
    )
    config = SimpleNamespace(max_in_flight_tokens=4096, model_config=model)
    found = [other_group(other, config) for other in cache.others]
    assert found == expected_groups(config), "from the model's config alone"
    for group in found:
        assert (group.block_size, group.window) == (PAGE, SLIDING)
        assert group.prefill_blocks(330) == 21 and group.prefill_blocks(1 << 20) == 4096 // PAGE + 1
        assert group.decode_blocks(330) == IN_WINDOW and group.decode_blocks(50) == 4
