import math
from fractions import Fraction

import numpy as np
import pytest

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.budget import (
    MIN_SPARE_PAGES,
    SPARE_PAGES_A_SATELLITE,
    SPARE_SHARE,
    compact_blocks,
    page_budgets,
    shortest_compacted,
    smallest_prompt,
    spare_pages,
)
from vllm_heterocache.heads.recipes import all_full

P, S, A, V = HeadRole.PIVOT, HeadRole.SATELLITE, HeadRole.ANCHOR, HeadRole.VOLATILE


def make_assignment(num_layers: int, num_kv_heads: int, num_full: int, seed: int = 0):
    """Pivots (the first leads) and anchors or satellites with weights from 0.3 to 3."""
    rng = np.random.default_rng(seed)
    num_heads = num_layers * num_kv_heads
    roles = np.full(num_heads, S, np.int8)
    roles[rng.permutation(num_heads)[:num_full]] = P
    first = int(np.flatnonzero(roles == P)[0]) if num_full else -1
    roles[(roles == S) & (np.arange(num_heads) < first)] = A
    leaders = np.where(roles == S, first, -1).astype(np.int32)
    if num_full == 0:
        roles[:] = A
    weights = np.where(roles == P, 0, 10 ** rng.uniform(-0.5, 0.5, num_heads)).astype(np.float32)
    shape = (num_layers, num_kv_heads)
    assignment = HeadAssignment(
        roles.reshape(shape), leaders.reshape(shape), weights.reshape(shape)
    )
    assignment.validate()
    return assignment


def with_weights(*weights: float) -> HeadAssignment:
    """One layer; weight 0 makes a volatile head, others anchors."""
    row = np.array([weights], np.float32)
    roles = np.where(row == 0, V, A).astype(np.int8)
    return HeadAssignment(roles, np.full(row.shape, -1, np.int32), row)


def slow_budgets(assignment: HeadAssignment, num_pages: int, total: int, least: int) -> list[int]:
    """The level of the water by bisection over fractions, then the largest remainders."""
    least = min(least, num_pages)
    weights = [Fraction(float(w)) for w in assignment.weights.flat]
    compressed = [i for i, w in enumerate(weights) if w > 0]
    rest = total - num_pages * (len(weights) - len(compressed))

    def shares(level):
        return {i: min(max(level * weights[i], least), num_pages) for i in compressed}

    low, high = Fraction(0), Fraction(num_pages) / min(weights[i] for i in compressed)
    for _ in range(90):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle).values()) <= rest else (low, middle)
    budgets = {i: math.floor(s + Fraction(1, 10**9)) for i, s in shares(low).items()}
    remainders = {i: s - budgets[i] for i, s in shares(low).items()}
    for i in sorted(compressed, key=lambda i: (-round(remainders[i], 9), i)):
        if sum(budgets.values()) < rest:
            budgets[i] += 1
    return [budgets.get(i, num_pages) for i in range(len(weights))]


@pytest.mark.parametrize("percent", [1, 7, 12, 20, 30, 33, 50, 58, 99, 100])
def test_compact_blocks_is_the_exact_ceiling(percent):
    """Floats get this wrong: 0.07 * 100 is more than 7, 0.58 * 50 is less than 29."""
    for num_pages in [*range(0, 400), 14000, 131072]:
        expected = math.ceil(Fraction(percent, 100) * num_pages)
        assert compact_blocks(16 * num_pages, percent / 100) == expected
        assert compact_blocks(16 * num_pages + 15, percent / 100) == expected


def test_compact_blocks_of_binary_noise():
    assert compact_blocks(160, 0.1 + 0.2) == 3
    assert compact_blocks(10, 0.5) == 0  # no full page
    assert compact_blocks(64, 0.5, page_size=4) == 8


def test_worked_example_by_weight():
    """100 pages in a whole head, the other 80 shared 1 : 2 : 5."""
    budgets = page_budgets(with_weights(1, 0, 2, 5), 100, 180, 4)
    assert budgets.tolist() == [[10, 100, 20, 50]]
    assert budgets.dtype == np.int32


def test_worked_example_excess_is_spread_over_the_others():
    """1 : 2 : 9 of 180 would be 15, 30, 135; the 35 over the prompt go to the others 1 : 2."""
    budgets = page_budgets(with_weights(1, 2, 9), 100, 180, 4)
    assert budgets.tolist() == [[27, 53, 100]]  # 26.67, 53.33


def test_worked_example_shortage_is_taken_from_the_others():
    """1 : 10 : 10 of 42 would be 2, 20, 20; the least is 6, so the others lose two each."""
    assert page_budgets(with_weights(1, 10, 10), 100, 42, 6).tolist() == [[6, 18, 18]]


@pytest.mark.parametrize("num_heads", [5, 77])
@pytest.mark.parametrize("extra", range(5))
def test_equal_remainders_go_to_the_lowest_index(num_heads, extra):
    assignment = with_weights(*[0.3] * num_heads)
    budgets = page_budgets(assignment, 100, 10 * num_heads + extra, 4)
    assert budgets.tolist() == [[11] * extra + [10] * (num_heads - extra)]


@pytest.mark.parametrize("shape", [(30, 3), (32, 8), (1, 11), (7, 1)], ids=str)
@pytest.mark.parametrize("num_pages", [63, 111, 1000])
@pytest.mark.parametrize("seed", range(2))
def test_budgets_agree_with_slow_reference(shape, num_pages, seed):
    num_heads = shape[0] * shape[1]
    assignment = make_assignment(*shape, num_full=max(1, num_heads // 7), seed=seed)
    least = 5
    floor = assignment.num_full * (num_pages - least) + num_heads * least
    whole = num_heads * num_pages
    for total in {floor, floor + 1, (2 * floor + whole) // 3, (floor + whole) // 2, whole - 1}:
        budgets = page_budgets(assignment, num_pages, total, least)
        assert budgets.reshape(-1).tolist() == slow_budgets(assignment, num_pages, total, least)


@pytest.mark.parametrize("seed", range(40))
def test_budgets_are_exact_bounded_and_ordered_by_weight(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 20)), int(rng.integers(1, 12)))
    num_heads = shape[0] * shape[1]
    assignment = make_assignment(*shape, num_full=int(rng.integers(0, num_heads)), seed=seed)
    num_pages, least = int(rng.integers(1, 700)), int(rng.integers(0, 9))
    low = min(least, num_pages)
    floor = assignment.num_full * (num_pages - low) + num_heads * low
    total = int(rng.integers(floor, num_heads * num_pages + 1))
    budgets = page_budgets(assignment, num_pages, total, least)
    assert budgets.sum() == total
    assert (budgets[assignment.full] == num_pages).all()
    assert budgets.min() >= low and budgets.max() <= num_pages
    compressed = ~assignment.full
    by_weight = np.argsort(assignment.weights[compressed])
    assert (np.diff(budgets[compressed][by_weight]) >= -1).all()


def test_extreme_weights_keep_the_sum_and_the_bounds():
    for total in range(12, 301):
        budgets = page_budgets(with_weights(1e-6, 1, 1e6), 100, total, 4)
        assert budgets.sum() == total and budgets.min() >= 4 and budgets.max() <= 100


def test_more_than_everything_keeps_every_head_whole():
    assignment = make_assignment(3, 2, 2)
    assert (page_budgets(assignment, 50, 300, 5) == 50).all()
    assert (page_budgets(assignment, 50, 999, 5) == 50).all()
    assert (page_budgets(all_full(3, 2), 50, 300, 5) == 50).all()
    assert (page_budgets(assignment, 0, 0, 5) == 0).all()


def test_prompt_shorter_than_the_least_budget_must_be_whole():
    assignment = with_weights(0, 1, 1)
    assert page_budgets(assignment, 3, 9, 5).tolist() == [[3, 3, 3]]
    with pytest.raises(ValueError, match="gpu_budget"):
        page_budgets(assignment, 3, 8, 5)


def test_budget_under_the_floor_is_refused_with_the_fix():
    assignment = with_weights(0, 0, 1, 1)
    assert page_budgets(assignment, 100, 210, 5).tolist() == [[100, 100, 5, 5]]
    with pytest.raises(ValueError, match=r"gpu_budget gives 209 pages.*floor of 210") as caught:
        page_budgets(assignment, 100, 209, 5)
    assert "raise gpu_budget to 0.525" in str(caught.value)


def test_spare_pages_are_a_share_of_the_compressed_heads_pages():
    assignment = make_assignment(30, 3, 13)
    total = 90 * 50
    assert spare_pages(assignment, 150, total) == int((total - 13 * 150) * SPARE_SHARE) == 159
    most = SPARE_PAGES_A_SATELLITE * assignment.count(HeadRole.SATELLITE)
    for scale in (1, 2):
        assert spare_pages(assignment, scale * 1000, scale * 90 * 300) == most
    assert spare_pages(with_weights(1, 0, 2), 100, 250) == 0  # no satellites
    assert spare_pages(all_full(3, 2), 100, 600) == 0
    assert spare_pages(assignment, 1000, 0) == 0
    # one at least: satellites could not get pages otherwise
    assert spare_pages(make_assignment(2, 2, 1), 10, 4 * 6) == MIN_SPARE_PAGES == 1
    assert spare_pages(make_assignment(2, 2, 1), 10, 1) == 1


def is_compactable(assignment, gpu_budget, num_pages, least):
    total = compact_blocks(16 * num_pages, gpu_budget) * assignment.num_heads
    spare = spare_pages(assignment, num_pages, total)
    try:
        budgets = page_budgets(assignment, num_pages, total - spare, least)
    except ValueError:
        return False
    return budgets.sum() + spare <= total and budgets.min() >= least


@pytest.mark.parametrize("gpu_budget", [0.12, 0.2, 0.3, 0.37, 0.5, 0.77, 0.9999])
@pytest.mark.parametrize("least", [1, 5, 9])
def test_smallest_prompt_is_the_length_from_which_all_are_feasible(gpu_budget, least):
    num_full = int(gpu_budget * 45)
    ranks = [make_assignment(30, 3, num_full), make_assignment(10, 3, num_full // 3, seed=1)]
    tokens = smallest_prompt(ranks, gpu_budget, least)
    assert tokens % 16 == 0
    feasible = [all(is_compactable(r, gpu_budget, n, least) for r in ranks) for n in range(2000)]
    expected = 2000 - feasible[::-1].index(False)
    assert tokens // 16 == expected < 1000


def test_smallest_prompt_of_a_full_budget_is_one_page():
    assert smallest_prompt([all_full(4, 2)], 1.0, 5) == 16


@pytest.mark.parametrize("gpu_budget", [0.5, 0.4, 0.5 + 1e-9])
def test_smallest_prompt_refuses_a_budget_that_never_suffices(gpu_budget):
    with pytest.raises(ValueError, match=rf"gpu_budget {gpu_budget} .*0\.5000.*raise gpu_budget"):
        smallest_prompt([with_weights(0, 0, 1, 1)], gpu_budget, 5)


@pytest.mark.parametrize("least", [10**8, 10**30])
def test_smallest_prompt_refuses_more_protected_pages_than_a_prompt_has(least):
    words = rf"gpu_budget 0\.8 .* for the {least} pages .*; .* lower sink_pages or recent_pages"
    with pytest.raises(ValueError, match=words):
        smallest_prompt([with_weights(0, 0, 1, 1)], 0.8, least)


def test_smallest_prompt_refuses_whole_heads_under_a_partial_budget():
    with pytest.raises(ValueError, match=r"gpu_budget 0\.9"):
        smallest_prompt([all_full(4, 2)], 0.9, 5)


@pytest.mark.parametrize("block_pages", [2, 3, 33])
@pytest.mark.parametrize("gpu_budget", [0.01, 0.1, 0.3, 0.5, 0.8, 0.97])
def test_from_some_length_on_compaction_saves_whole_blocks(gpu_budget, block_pages):
    block_size = 16 * block_pages
    shortest = shortest_compacted(0, gpu_budget, block_size)

    def saved(num_tokens: int) -> int:
        taken = math.ceil(compact_blocks(num_tokens, gpu_budget) / block_pages)
        return num_tokens // block_size - taken

    assert all(saved(tokens) >= 1 for tokens in range(shortest, 5 * shortest, 16))
    assert shortest % block_size == 0 and saved(shortest - 1) < 1
    assert shortest_compacted(shortest + 5, gpu_budget, block_size) == shortest + 5


@pytest.mark.parametrize(("gpu_budget", "block_size"), [(0.3, 16), (1.0, 528)])
def test_blocks_of_a_page_and_a_budget_of_1_shorten_no_prompt(gpu_budget, block_size):
    assert shortest_compacted(77, gpu_budget, block_size) == 77
