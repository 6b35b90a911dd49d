"""The simulation of what evicted tokens leave behind, on a tiny model with random weights."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compact_heads import Compactor, Method, Prompt, whole_caches
from counting import Counting
from matched_tokens import Text, chain_text, compare, parse_arguments, simulate, table
from retrieval import RetrievingReader, averaged, exchanged, rounded_keys, summary_scores
from simulated_model import CacheReader, SimulatedModel
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.assignment import HeadRole
from vllm_heterocache.heads.budget import SPARE_PAGES_A_SATELLITE, compact_blocks
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity

LAYERS, HEADS, LENGTH, FOLLOWING = 3, 2, 400, 24
BUDGET = 0.49  # one of the six heads is whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama of 3 layers, 4 query and 2 KV heads of 16, whose attention is not quite even."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=16,
        vocab_size=199,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder) -> SimulatedModel:
    return SimulatedModel(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    identity = ModelIdentity("tiny", "LlamaForCausalLM", LAYERS, 4, HEADS, 16)
    scores = np.linspace(0.1, 1, LAYERS * HEADS, dtype=np.float32).reshape(LAYERS, HEADS)
    return HeadProfile(identity, {}, {}, retrieval=scores)


@pytest.fixture(scope="module")
def text() -> Text:
    tokens = torch.randint(199, (LENGTH + FOLLOWING,), generator=torch.Generator().manual_seed(3))
    ids = tokens.tolist()
    return Text("prose", 0, ids[:LENGTH], ids[LENGTH:], {})


def test_a_whole_cache_gives_the_log_probabilities_of_the_model(folder, model, profile, text):
    plain = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = plain(torch.tensor([text.prompt + text.tokens])).logits[0, LENGTH:]
    prompt = Prompt(model, model.prefill(text.prompt), seed=0)
    mine = model.follow(text.tokens, LENGTH, CacheReader(whole_caches(prompt)))
    torch.testing.assert_close(mine, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_a_budget_of_all_pages_changes_nothing(model, profile, text):
    methods = [Method(kind) for kind in ("pages", "means", "matched")]
    rows = list(simulate(model, profile, [text], [1.0], methods))
    assert [row["config"]["method"] for row in rows] == ["full", "pages", "means", "matched"]
    for row in rows:
        assert row["kl"] == pytest.approx(0, abs=1e-6)
        assert row["top1"] == 1


def test_matched_tokens_beat_pages_alone_and_means(model, profile, text):
    methods = [Method("pages"), Method("means"), Method("matched")]
    _, pages, means, matched = (
        row["kl"] for row in simulate(model, profile, [text], [0.5], methods)
    )
    assert matched < 0.5 * pages
    assert matched < means


@pytest.mark.parametrize("kind", ["pages", "means", "matched"])
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_methods_keep_as_many_tokens(model, profile, text, kind, budget):
    prompt = Prompt(model, model.prefill(text.prompt), seed=0)
    compactor = Compactor.of(profile, budget, full_share=0.5)
    sizes = {
        method: [len(cache.bias) for row in compactor.compact(prompt, method) for cache in row]
        for method in (Method("pages"), Method(kind))
    }
    assert sizes[Method(kind)] == sizes[Method("pages")]
    num_tokens = compact_blocks(LENGTH, budget) * PAGE_SIZE * LAYERS * HEADS
    assert sum(sizes[Method(kind)]) == num_tokens


@pytest.mark.parametrize(("bound", "pages"), [(0, 0), (0.5, 1), (1, 2), (9, 6)])
def test_matched_tokens_are_bounded_by_reference_queries(bound, pages, model, profile, text):
    """16 positions have 32 queries of a group of two, which are two pages of tokens. Without the
    bound the largest of the compressed heads has six such pages."""
    method = Method("matched", positions=16, bound=bound)
    compactor = Compactor.of(profile, BUDGET, None)
    kept = compactor.keep(Prompt(model, model.prefill(text.prompt), seed=0), method)
    most = max(len(head.stand_ins.bias) for row in kept for head in row)
    assert most == pages * PAGE_SIZE


def test_a_budget_below_the_floor_is_left_out(model, profile, text, capsys):
    rows = list(simulate(model, profile, [text], [0.2], [Method("pages")]))
    assert [row["config"]["method"] for row in rows] == ["full"]
    assert "raise gpu_budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    ["behind=0", "means=0.3", "behind=1000", "sample=even", "sample=random", "iterations=30",
     "sample=mixed", "step=2", "sample=mixed,elsewhere=0.1", "full_share=0.4",
     "stored=bfloat16", "positions=20", "pages=reference", "pages=largest", "pages=both",
     "pages=any", "pages=reference,chosen_by=4", "first_layer=0.4", "share=0.3"],
)  # fmt: skip
def test_every_setting_of_matched_tokens_is_near_the_default(model, profile, text, settings):
    method = Method.parse(f"matched,{settings}")
    rows = simulate(model, profile, [text], [BUDGET], [Method("pages"), method])
    _, pages, matched = (row["kl"] for row in rows)
    assert matched < pages


def test_queries_moved_by_rotation_are_those_of_the_other_position(model):
    vectors = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1))
    start, end = torch.tensor([0, 3, 9, 40, 7]), torch.tensor([9, 0, 300, 41, 7])
    there = model.rotated(vectors, end)
    moved = model.rotated(model.rotated(vectors, start), end - start)
    torch.testing.assert_close(moved, there, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.rotated(vectors, start), there, atol=1e-2)


def test_the_table_has_means_of_texts_and_sums_of_questions():
    same = {"tokens": 100, "config": {"gpu_budget": 0.1, "method": "pages"}}
    rows = [
        same | {"kl": 0.1, "kl_of_last": 0.0, "top1": 0.5},
        same | {"kl": 0.3, "kl_of_last": 1.0, "top1": 1.0},
    ]
    assert table(rows) == [[100, 0.1, "pages", 2, 0.2, 0.5, 0.75, 0, 0, None]]
    rows += [same | {"right": 2, "asked": 3, "nll": 1.0}, same | {"right": 1, "asked": 1, "nll": 3}]
    assert table(rows) == [[100, 0.1, "pages", 2, 0.2, 0.5, 0.75, 3, 4, 1.5]]


def test_methods_are_read_as_they_are_written():
    method = Method("matched", share=0.25, sample="random")
    assert str(method) == "matched,share=0.25,sample=random"
    assert Method.parse(str(method)) == method
    with pytest.raises(ValueError, match="'sahre' is none of kind, full_share, share"):
        Method.parse("matched,sahre=1")
    with pytest.raises(ValueError, match="sample is one of random, even, last"):
        Method.parse("matched,sample=first")


@pytest.mark.parametrize(
    ("settings", "message"),
    [("most=-1", "most is below 0; give a number, or 0 for no bound"),
     ("fetchers=-4", "fetchers is below 0; give a number, or 0 for all heads"),
     ("most=some", "most is an int, not 'some'"),
     ("bound=-0.5", "bound is below 0; give a number, or 0 for no matched tokens"),
     ("share=half", "share is a float, not 'half'"),
     ("most=4,moves=spare", "most and moves=spare bound the same pages; remove either")],
)  # fmt: skip
def test_a_setting_without_meaning_is_named_on_the_command_line(settings, message, capsys):
    with pytest.raises(ValueError, match=message):
        Method.parse(f"matched,{settings}")
    with pytest.raises(SystemExit):
        parse_arguments(["model", "--profile", "p", "--methods", f"matched,{settings}"])
    assert f"argument --methods: matched,{settings}: {message}" in capsys.readouterr().err


class _Letters:
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) % 199 for letter in text]


def test_an_answer_counts_if_each_of_its_tokens_is_the_likeliest():
    text = chain_text(_Letters(), 3000, 0, "register", 4)
    assert len(text.answers) == 3  # without the first question's
    right = torch.nn.functional.one_hot(torch.tensor(text.tokens), 199).float()
    greedy = right.roll(-1, 0)
    assert compare(text, greedy, greedy) == {"right": 3, "asked": 3, "nll": -answer_length(text)}
    start, answer = next(iter(text.answers.items()))
    wrong = greedy.clone()
    wrong[start + len(answer) - 2] = right[0].roll(1)
    assert compare(text, greedy, wrong) == {
        "right": 2,
        "asked": 3,
        "nll": pytest.approx(1 / 3 - answer_length(text)),
    }


def answer_length(text: Text) -> float:
    """Mean tokens of an answer."""
    return sum(map(len, text.answers.values())) / len(text.answers)


def test_nll_is_of_all_tokens_of_right_answers_and_of_nothing_else():
    text = Text("station", 0, [], [5, 6, 7, 8, 9], {1: [6, 7], 4: [9]})
    probability = torch.full((5, 10), 0.01)
    probability[0, 6], probability[1, 7], probability[3, 9] = 0.5, 0.25, 0.125
    expected = np.log(2 * 4 * 8) / 2
    assert compare(text, probability, probability.log())["nll"] == pytest.approx(expected)


# --- pages that come back ---

OF_ALL = "fetched_for=compressed"
ORACLE = f"{OF_ALL},fetch=own,lag=0,interval=1"


@pytest.fixture(scope="module")
def prompt(model, text) -> Prompt:
    return Prompt(model, model.prefill(text.prompt), seed=0)


def kl_of(model, profile, text, *settings: str) -> list[float]:
    methods = [Method.parse(one) for one in settings]
    return [row["kl"] for row in simulate(model, profile, [text], [BUDGET], methods)][1:]


@pytest.mark.parametrize("kind", ["pages", "means", "matched", "matched,means=0.3"])
def test_a_reader_that_fetches_nothing_reads_the_caches(model, profile, text, prompt, kind):
    method, compactor = Method.parse(kind), Compactor.of(profile, 0.5, full_share=0.5)
    reader = RetrievingReader(prompt, compactor, method, compactor.keep(prompt, method))
    mine = model.follow(text.tokens, LENGTH, reader)
    plain = CacheReader(compactor.compact(prompt, method))
    torch.testing.assert_close(mine, model.follow(text.tokens, LENGTH, plain), rtol=0, atol=1e-4)
    assert reader.fetched == 0


def test_pages_chosen_by_the_present_query_are_the_best(model, profile, text):
    none, late, oracle = kl_of(
        model, profile, text, "pages", f"pages,{OF_ALL},fetch=own", f"pages,{ORACLE}"
    )
    assert oracle < 0.9 * none
    assert oracle < late


@pytest.mark.parametrize("kind", ["mean", "offset", "halves", "bounds"])
def test_pages_chosen_by_summaries_are_better_than_those_of_the_prompt(model, profile, text, kind):
    none, fetched = kl_of(model, profile, text, "pages", f"pages,{ORACLE}".replace("own", kind))
    assert fetched < none


def test_lists_keep_their_size_and_their_protected_pages(model, profile, text, prompt):
    method = Method.parse(f"pages,{OF_ALL},fetch=own,decay=0.5,moves=spare")
    compactor = Compactor.of(profile, 0.5, full_share=0.5)
    kept, seen = compactor.keep(prompt, method), []

    class Watched(RetrievingReader):
        def _held(self, layer, head, *logits):
            seen.append((self.kept[layer][head].pages, super()._held(layer, head, *logits)))
            return seen[-1][1]

    reader = Watched(prompt, compactor, method, kept)
    model.follow(text.tokens, LENGTH, reader)
    assert len(seen) == LAYERS * HEADS
    for pages, held in seen:
        assert (held.sum(1) == pages.sum()).all()
        assert held[:, 0].all() and held[:, -3:].all()
        assert (held[0] == pages).all()
        assert ((held[1:] & ~held[:-1]).sum(1) <= reader._most_moves()).all()
    assert reader.fetched > 0


def test_a_list_reads_what_was_asked_for_two_tokens_before(prompt, profile):
    compactor = Compactor.of(profile, 0.5, full_share=0.5)
    reader = RetrievingReader(prompt, compactor, Method.parse("pages,fetch=own"), [])
    assert reader._checks(7).tolist() == [0, 2, 4]
    assert reader._state_of(7).tolist() == [0, 0, 1, 1, 2, 2, 3]
    reader = RetrievingReader(prompt, compactor, Method.parse(f"pages,{ORACLE}"), [])
    assert reader._checks(3).tolist() == [0, 1, 2]
    assert reader._state_of(3).tolist() == [1, 2, 3]


@pytest.fixture(scope="module")
def led() -> Compactor:
    """The first layer's heads are alike, and one of them is a pivot."""
    identity = ModelIdentity("tiny", "LlamaForCausalLM", LAYERS, 4, HEADS, 16)
    scores = np.array([[1, 0.1], [0.1, 0.1], [0.1, 0.2]], np.float32)
    similarity = np.zeros((3, LAYERS, HEADS, HEADS), np.float32)
    similarity[0, 0] = 1
    profile = HeadProfile(identity, {}, {}, retrieval=scores, similarity=similarity)
    return Compactor.of(profile, 0.5, full_share=0.4)


def held_pages(model, text, prompt, compactor, settings: str) -> dict[int, torch.Tensor]:
    """[C + 1, P] of each head, by its flat index."""
    method, held = Method.parse(settings), {}

    class Watched(RetrievingReader):
        def _held(self, layer, head, *logits):
            held[layer * HEADS + head] = super()._held(layer, head, *logits)
            return held[layer * HEADS + head]

    reader = Watched(prompt, compactor, method, compactor.keep(prompt, method))
    model.follow(text.tokens, LENGTH, reader)
    return held


def test_satellites_follow_their_pivot_and_anchors_do_not(model, text, prompt, led):
    roles = led.assignment.roles.reshape(-1).tolist()
    assert HeadRole.SATELLITE in roles and HeadRole.ANCHOR in roles
    held = held_pages(model, text, prompt, led, "pages,fetch=pivot")
    assert [len(held[flat]) > 1 for flat in range(len(roles))] == [
        role == HeadRole.SATELLITE for role in roles
    ]


def test_few_fetchers_are_the_compressed_heads_of_the_largest_weights(model, text, prompt, led):
    weights = np.where(led.assignment.full, -1, led.assignment.weights).reshape(-1)
    held = held_pages(model, text, prompt, led, f"pages,{OF_ALL},fetch=bits,fetchers=2")
    fetching = [flat for flat, states in held.items() if len(states) > 1]
    assert len(fetching) == 2
    assert min(weights[fetching]) >= max(np.delete(weights, fetching))


EXCHANGE = f"pages,{OF_ALL},fetch=own,fetchers=2,lag=0,interval=1"


def test_no_more_pages_come_at_a_check_than_the_bound(model, text, prompt, led):
    free = held_pages(model, text, prompt, led, f"{EXCHANGE},most=1000")
    one = held_pages(model, text, prompt, led, f"{EXCHANGE},most=1")
    for flat in led.fetchers(Method.parse(EXCHANGE)).tolist():
        new = [(held[flat][1:] & ~held[flat][:-1]).sum(1) for held in (free, one)]
        assert new[0].max() > 1 == new[1].max()
        assert (free[flat].sum(1) == free[flat][0].sum()).all()


def test_fetchers_that_exchange_pages_leave_their_heads_the_whole_budget(prompt, led):
    listed = {
        settings: sum(
            int(head.pages.sum())
            for row in led.keep(prompt, Method.parse(f"{EXCHANGE},{settings}"))
            for head in row
        )
        for settings in ("most=4", "moves=spare")
    }
    total = compact_blocks(LENGTH, 0.5) * LAYERS * HEADS
    spares = led.spares(prompt, Method.parse(f"{EXCHANGE},moves=spare"))
    assert listed == {"most=4": total, "moves=spare": total - spares}
    assert spares > 0


def test_a_bound_on_satellites_leaves_them_their_spare_pages(prompt, led):
    plain, bound = Method.parse("pages,fetch=pivot"), Method.parse("pages,fetch=pivot,most=4")
    assert led.spares(prompt, bound) == led.spares(prompt, plain) > 0


def test_spare_pages_grow_with_the_fetchers(profile):
    longer = SimpleNamespace(num_tokens=10 * LENGTH, num_pages=10 * LENGTH // PAGE_SIZE)
    compactor = Compactor.of(profile, 0.5, full_share=0.3)
    assert not compactor.assignment.count(HeadRole.SATELLITE)
    spares = [
        compactor.spares(longer, Method.parse(f"pages,fetch=own,fetchers={count}"))
        for count in (0, 1, 2)
    ]
    assert spares == [0, SPARE_PAGES_A_SATELLITE, 2 * SPARE_PAGES_A_SATELLITE]


def test_methods_that_set_other_pages_aside_are_compacted_apart(model, profile, text):
    late = f"pages,{OF_ALL},fetch=own,fetchers=2,moves=spare"
    both = kl_of(model, profile, text, late, f"{EXCHANGE},most=4")
    assert both == kl_of(model, profile, text, late) + kl_of(
        model, profile, text, f"{EXCHANGE},most=4"
    )


def test_satellites_beside_their_pivot_may_be_a_check_later(model, text, prompt, led):
    satellite = led.assignment.roles.reshape(-1).tolist().index(HeadRole.SATELLITE)
    now = held_pages(model, text, prompt, led, "pages,fetch=pivot,lag=0")[satellite]
    later = held_pages(model, text, prompt, led, "pages,fetch=pivot,lag=0,beside=1")[satellite]
    assert not (now[1:] == now[:-1]).all()
    assert (later[1:] == now[:-1]).all()
    assert (later[0] == now[0]).all()


def test_an_exchange_takes_the_best_and_gives_up_the_worst():
    pages = np.array([True, True, True, False, False, False])
    scores = np.array([[9, 2, 1, 8, 7, 0.0], [9, 0, 5, 8, 7, 0.0]])
    wanted = np.array([[True, False, False, True, True, False]] * 2)
    held = exchanged(pages, scores, wanted, None, 1)
    assert [np.flatnonzero(row).tolist() for row in held] == [[0, 1, 2], [0, 1, 3], [0, 3, 4]]
    still = exchanged(pages, scores, wanted, np.array([False, True]), 2)
    assert [np.flatnonzero(row).tolist() for row in still] == [[0, 1, 2], [0, 1, 2], [0, 3, 4]]


def test_one_query_that_stays_chooses_pages_as_the_last_query_does(prompt):
    last, alone, any_of, both, mean = (
        prompt.choosing_scores(1, 0, Method.parse(f"matched,pages={how},chosen_by=1,behind=0"))
        for how in ("last", "largest", "any", "both", "reference")
    )
    torch.testing.assert_close(alone, last)
    torch.testing.assert_close(any_of, last)
    torch.testing.assert_close(both, last + mean)
    assert not torch.allclose(mean, last)


def test_a_pivot_that_does_not_drift_asks_for_nothing(model, profile, prompt):
    compactor = Compactor.of(profile, 0.5, full_share=0.5)
    reader = RetrievingReader(prompt, compactor, Method.parse("pages,fetch=pivot,drift=0.7"), [])
    same = prompt.page_scores(0, 0)
    other = same.flip(0)
    assert reader._drifted(0, torch.stack([same, same])).tolist() == [False, False]
    asks = reader._drifted(0, torch.stack([same, other, *[other] * 5]))
    assert asks.tolist() == [False, True, True, True, True, False, False]


def test_running_means_begin_with_the_prompts():
    scores = torch.tensor([[4.0], [0.0]])
    assert averaged(scores, torch.tensor([8.0]), 0.5).tolist() == [[6], [3]]


def test_an_offset_makes_pages_right_for_one_reference_query():
    random = torch.Generator().manual_seed(5)
    keys, query = torch.randn(96, 8, generator=random), torch.randn(1, 1, 8, generator=random)
    exact = (query @ keys.T).unflatten(2, (-1, PAGE_SIZE)).logsumexp(3).softmax(-1).amax(0)
    for kind in ("offset", "halves"):
        scores = summary_scores(kind, keys, query, query[0])
        torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-5)


def test_bounds_are_above_every_logit_and_a_mean_of_one_key_is_that_key():
    random = torch.Generator().manual_seed(2)
    keys = torch.randn(4 * PAGE_SIZE + 3, 8, generator=random)
    query = torch.randn(2, 5, 8, generator=random)
    logits = (query @ keys[: 4 * PAGE_SIZE].T).unflatten(2, (4, PAGE_SIZE))
    assert (summary_scores("bounds", keys, query, query[0]) >= logits.amax((0, 3)) - 1e-5).all()
    equal = keys[::PAGE_SIZE][:4].repeat_interleave(PAGE_SIZE, 0)
    exact = (query @ equal[::PAGE_SIZE].T).softmax(-1).amax(0)
    for kind in ("mean", "offset", "halves"):
        torch.testing.assert_close(summary_scores(kind, equal, query, query[0]), exact)


def test_keys_of_few_bits_are_numbers_between_the_least_and_the_largest_of_their_page():
    random = torch.Generator().manual_seed(3)
    pages = torch.randn(3, PAGE_SIZE, 5, generator=random)
    pages[1, :, 2] = 0.25  # a channel in which all keys are equal
    for key_bits in (1, 2, 4):
        rounded = rounded_keys(pages, key_bits)
        span = pages.amax(1) - pages.amin(1)
        error = (rounded - pages).abs().amax(1)
        assert (error <= span / (2**key_bits - 1) / 2 * 1.001).all()
        assert all(len(channel.unique()) <= 2**key_bits for channel in rounded[0].T)
    torch.testing.assert_close(rounded_keys(pages, 16), pages, rtol=0, atol=1e-3)


def test_keys_of_many_bits_score_as_the_keys_do():
    random = torch.Generator().manual_seed(4)
    keys, query = torch.randn(70, 8, generator=random), torch.randn(2, 3, 8, generator=random)
    full = keys[: 4 * PAGE_SIZE]
    exact = (query @ full.T).softmax(-1).unflatten(2, (-1, PAGE_SIZE)).sum(3).amax(0)
    scores = [summary_scores("bits", keys, query, query[0], bits) for bits in (1, 2, 4, 16)]
    errors = [float((one - exact).abs().mean()) for one in scores]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[0]


class TestCounting:
    """What stand-ins do while pages that they stand for are read."""

    METHOD = "matched,means=0.3,fetch=own,counted="

    @pytest.fixture(scope="class")
    def kept(self, profile, prompt):
        """The last layer's first head: means, matched tokens and pages."""
        method = Method.parse(self.METHOD + "twice")
        kept = Compactor.of(profile, 0.55, full_share=0.5).keep(prompt, method)[2][0]
        assert 0 < kept.num_means < len(kept.stand_ins.bias)
        return kept

    def counting(self, prompt, kept, counted: str) -> Counting:
        return Counting(prompt, Method.parse(self.METHOD + counted), 2, 0, kept)

    def share_and_output(self, prompt, kept, bias, values):
        """[N] and [N, D] of the stand-ins under the reference queries."""
        queries = prompt.reference_queries(2, 0, Method.parse(self.METHOD + "refit"))[0]
        lse = (queries @ prompt.read.keys[2][:, 0].T).logsumexp(-1)
        weights = (queries @ kept.stand_ins.keys.T + bias - lse[:, None]).exp()
        return weights.sum(1), weights @ values

    @pytest.mark.parametrize("counted", ["means", "own", "shares", "refit"])
    def test_nothing_changes_while_the_list_is_that_of_compaction(self, prompt, kept, counted):
        bias, values = self.counting(prompt, kept, counted).of(kept.pages[None])
        before = self.share_and_output(prompt, kept, kept.stand_ins.bias, kept.stand_ins.values)
        after = self.share_and_output(prompt, kept, bias[0], values[0])
        for one, other in zip(after, before, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-2)

    def test_stand_ins_of_pages_that_all_came_back_weigh_nothing(self, prompt, kept):
        held = torch.ones(1, len(kept.pages), dtype=torch.bool)
        for counted in ("shares", "refit"):
            bias, values = self.counting(prompt, kept, counted).of(held)
            share, _ = self.share_and_output(prompt, kept, bias[0], values[0])
            twice, _ = self.share_and_output(prompt, kept, kept.stand_ins.bias, values[0])
            assert share.max() < 0.02 * twice.max()
        bias, _ = self.counting(prompt, kept, "own").of(held)
        assert (bias[0] <= kept.stand_ins.bias).all()
        assert (bias[0] < kept.stand_ins.bias).float().mean() > 0.5

    def test_a_page_that_came_back_counts_about_once(self, prompt, kept):
        """The fits but `twice` are nearer to what all tokens do together."""
        evicted = (~kept.pages).nonzero().flatten()
        held = kept.pages.repeat(len(evicted), 1)
        held[torch.arange(len(evicted)), evicted] = True
        queries = prompt.reference_queries(2, 0, Method.parse(self.METHOD + "refit"))[0]
        weights = (queries @ prompt.read.keys[2][:, 0].T).softmax(-1)
        errors = {}
        for counted in ("twice", "means", "own", "shares", "refit"):
            bias, values = self.counting(prompt, kept, counted).of(held)
            error = 0.0
            for state, gone in enumerate(~prompt.tokens_of(held)):
                mine = self.share_and_output(
                    prompt, kept, bias[state % len(bias)], values[state % len(values)]
                )[1]
                error += float((mine - weights[:, gone] @ prompt.read.values[2][gone, 0]).norm())
            errors[counted] = error
        assert errors["refit"] < 0.5 * errors["twice"]
        assert errors["shares"] < errors["twice"]
        assert errors["own"] < errors["twice"]
        assert errors["means"] < errors["twice"]
