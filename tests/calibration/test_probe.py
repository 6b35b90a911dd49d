import numpy as np
import pytest
import torch

from vllm_heterocache.calibration.probe import (
    AttentionProbe,
    Measurement,
    load_measurement,
    merge_ranks,
)


def whole_attention(query, keys, scale):
    """Slow reference: the N x N causal attention of every query head, [num_q_heads, N, N]."""
    group = query.shape[1] // keys.shape[1]
    per_q_head = keys.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), per_q_head) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1).numpy()


def slow_set(attention, columns, top_k, pool):
    """Top set of one KV head from its group's rows [group, N], token by token."""
    half = pool // 2
    row = attention.mean(axis=0)[:columns]
    padded = np.concatenate([np.zeros(half), row, np.zeros(half)])
    pooled = [padded[i : i + pool].mean() for i in range(columns)]
    return set(sorted(range(columns), key=lambda i: -pooled[i])[:top_k])


def random_prompt(num_tokens, num_kv_heads, group, head_dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_tokens, num_kv_heads * group, head_dim, generator=generator)
    keys = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator)
    return query.to(dtype), keys.to(dtype)


def observe_in_chunks(probe, layer, query, keys, chunks):
    first = 0
    for num_tokens in chunks:
        stop = first + num_tokens
        probe.observe(layer, query[first:stop], first, keys[:stop])
        first = stop
    assert first == len(query)


SPEC = {
    "sets": {"rows": [69, 70, 75, 82], "columns": 70, "top_k": 14, "pool": 5},
    "targets": [[0, 0, 1], [40, 7, 12], [40, 40, 41], [75, 60, 76], [82, 0, 83]],
}


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 8), (3, 17)])
def test_rows_equal_those_of_the_whole_attention_matrix(group, num_kv_heads, head_dim):
    query, keys = random_prompt(83, num_kv_heads, group, head_dim, seed=group)
    scale = 0.7 / head_dim**0.5
    probe = AttentionProbe(SPEC, [4], range(num_kv_heads), num_kv_heads * group, scale)
    probe.observe(4, query, 0, keys)
    measured = probe.measurement()
    attention = whole_attention(query, keys, scale)
    for head in range(num_kv_heads):
        rows = attention[head * group : (head + 1) * group]
        for i, row in enumerate(SPEC["sets"]["rows"]):
            got = set(np.flatnonzero(measured.sets()[i, 0, head]).tolist())
            assert got == slow_set(rows[:, row], 70, 14, 5)
        for i, (row, first, stop) in enumerate(SPEC["targets"]):
            mass = rows[:, row, first:stop].sum(axis=-1).max()
            assert measured.masses[i, 0, head] == pytest.approx(mass, abs=1e-6)


def test_what_a_sink_takes_is_no_attention_and_logits_are_capped():
    query, keys = random_prompt(83, 2, 3, 8)
    sinks = torch.linspace(-2, 4, 6)
    probe = AttentionProbe(SPEC, [4], range(2), 6, 0.4, sinks[None], 1.5)
    probe.observe(4, query, 0, keys)
    for i, (row, first, stop) in enumerate(SPEC["targets"]):
        for head in range(2):
            masses = []
            for q_head in range(3 * head, 3 * head + 3):
                logits = 1.5 * torch.tanh(keys[: row + 1, head] @ query[row, q_head] * 0.4 / 1.5)
                weights = torch.cat([logits, sinks[q_head : q_head + 1]]).softmax(0)
                masses.append(weights[first:stop].sum().item())
            found = probe.measurement().masses[i, 0, head]
            assert found == pytest.approx(max(masses), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "chunks", [[83], [1] * 83, [69, 1, 13], [40, 1, 42], [16, 16, 16, 16, 16, 3]], ids=str
)
def test_chunked_prefill_gives_exactly_the_same(chunks, dtype):
    query, keys = random_prompt(83, 3, 3, 16, dtype=dtype)
    whole = AttentionProbe(SPEC, [0, 1], [0, 1, 2], 9, 0.25)
    chunked = AttentionProbe(SPEC, [0, 1], [0, 1, 2], 9, 0.25)
    for layer in (0, 1):
        whole.observe(layer, query * (layer + 1), 0, keys)
        observe_in_chunks(chunked, layer, query * (layer + 1), keys, chunks)
    a, b = whole.measurement(), chunked.measurement()
    np.testing.assert_array_equal(a.masks, b.masks)
    np.testing.assert_array_equal(a.masses, b.masses)
    assert (a.masses[:, 0] != a.masses[:, 1]).any()


def test_transposed_and_strided_inputs_are_accepted():
    query, keys = random_prompt(83, 2, 2, 8)
    plain = AttentionProbe(SPEC, [0], [0, 1], 4, 0.3)
    strided = AttentionProbe(SPEC, [0], [0, 1], 4, 0.3)
    plain.observe(0, query, 0, keys)
    heads_first = keys.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([query, query], dim=-1)[..., :8]
    strided.observe(0, wide, 0, heads_first)
    np.testing.assert_array_equal(plain.measurement().masks, strided.measurement().masks)
    np.testing.assert_array_equal(plain.measurement().masses, strided.measurement().masses)


def test_ties_go_to_the_lower_index_and_every_set_has_top_k_members():
    query, keys = torch.zeros(30, 1, 4), torch.zeros(30, 1, 4)
    spec = {"sets": {"rows": [29], "columns": 21, "top_k": 6, "pool": 1}, "targets": []}
    probe = AttentionProbe(spec, [0], [0], 1, 1.0)
    probe.observe(0, query, 0, keys)
    assert np.flatnonzero(probe.measurement().sets()[0, 0, 0]).tolist() == [0, 1, 2, 3, 4, 5]


def test_missing_row_is_an_error_that_names_it():
    query, keys = random_prompt(83, 1, 1, 8)
    probe = AttentionProbe(SPEC, [5, 6], [0], 1, 1.0)
    probe.observe(5, query, 0, keys)
    probe.observe(6, query[64:], 64, keys)
    with pytest.raises(RuntimeError, match=r"position 0 in layer 6.*prefix caching off"):
        probe.measurement()


def test_row_computed_again_replaces_the_first_measurement():
    query, keys = random_prompt(83, 1, 2, 8)
    other_query, other_keys = random_prompt(83, 1, 2, 8, seed=9)
    probe = AttentionProbe(SPEC, [0], [0], 2, 0.4)
    probe.observe(0, other_query, 0, other_keys)
    probe.observe(0, query, 0, keys)
    once = AttentionProbe(SPEC, [0], [0], 2, 0.4)
    once.observe(0, query, 0, keys)
    np.testing.assert_array_equal(probe.measurement().masks, once.measurement().masks)
    np.testing.assert_array_equal(probe.measurement().masses, once.measurement().masses)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"sets": None, "targets": [[4, 3, 6]]}, "Row 4 cannot see all of target span 3..6"),
        ({"sets": None, "targets": [[4, 3, 3]]}, "target span 3..3"),
        (
            {"sets": {"rows": [9, 5], "columns": 10, "top_k": 2, "pool": 5}, "targets": []},
            "Set row 5 cannot see 10 columns",
        ),
        (
            {"sets": {"rows": [9], "columns": 10, "top_k": 11, "pool": 5}, "targets": []},
            "top_k must be in 1..10, not 11",
        ),
        (
            {"sets": {"rows": [9], "columns": 10, "top_k": 2, "pool": 4}, "targets": []},
            "pool must be odd, not 4",
        ),
    ],
)
def test_impossible_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        AttentionProbe(spec, [0], [0], 1, 1.0)


def test_query_heads_must_divide_among_kv_heads():
    with pytest.raises(ValueError, match="4 query heads do not divide among 3 KV heads"):
        AttentionProbe({"sets": None, "targets": []}, [0], [0, 1, 2], 4, 1.0)


def test_spec_without_sets_gives_masses_only():
    query, keys = random_prompt(9, 1, 1, 8)
    probe = AttentionProbe({"sets": None, "targets": [[8, 2, 4]]}, [0], [0], 1, 1.0)
    probe.observe(0, query, 0, keys)
    measured = probe.measurement()
    assert measured.masks.shape == (0, 1, 1, 0) and measured.masses.shape == (1, 1, 1)


def test_ranks_saved_apart_merge_into_the_whole(tmp_path):
    """Two TP ranks of two PP ranks, merged in an arbitrary order, equal one rank with all heads."""
    inputs = {layer: random_prompt(83, 4, 2, 8, seed=layer) for layer in range(3)}
    whole = AttentionProbe(SPEC, range(3), range(4), 8, 0.3)
    for layer, (query, keys) in inputs.items():
        whole.observe(layer, query, 0, keys)
    paths = []
    for layers in ([2], [0, 1]):
        for heads in ([2, 3], [0, 1]):
            probe = AttentionProbe(SPEC, layers, heads, 4, 0.3)
            for layer in layers:
                query, keys = inputs[layer]
                rank_queries = query[:, 2 * heads[0] : 2 * heads[-1] + 2]
                probe.observe(layer, rank_queries, 0, keys[:, heads])
            paths.append(tmp_path / f"prompt.rank{len(paths)}.npz")
            probe.save(paths[-1])
    merged, expected = merge_ranks([load_measurement(p) for p in paths]), whole.measurement()
    assert merged.layer_ids == [0, 1, 2] and merged.kv_head_ids == [0, 1, 2, 3]
    np.testing.assert_array_equal(merged.sets(), expected.sets())
    np.testing.assert_array_equal(merged.masses, expected.masses)


def part(layers, heads):
    shape = (len(layers), len(heads))
    return Measurement(
        layers, heads, 8, np.zeros((1, *shape, 1), np.uint8), np.zeros((2, *shape), np.float32)
    )


def test_ranks_that_share_a_head_are_refused():
    with pytest.raises(ValueError, match="lower tensor_parallel_size"):
        merge_ranks([part([0, 1], [0]), part([0, 1], [0])])


def test_ranks_that_leave_a_head_out_are_refused():
    with pytest.raises(ValueError, match="did not measure every layer and KV head"):
        merge_ranks([part([0], [0, 1]), part([1], [0])])
