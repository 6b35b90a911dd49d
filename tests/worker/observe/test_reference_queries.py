"""Which queries of a prompt are kept for its matched tokens, and who has room for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_heterocache.worker.observe import reference_queries
from vllm_heterocache.worker.observe.reference_queries import ReferenceQueries, reference_positions
from vllm_heterocache.worker.ops.interface import Geometry

ROOM = 200
LONG = 300  # tokens of a prompt
GEOMETRY = Geometry(
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    scale=1.0,
    dtype=torch.float32,
    max_rows=8,
    max_queries=1,
    num_query_windows=8,
    window=1,
)


class Prefills:
    """Prompts of `LONG` tokens. The query of token p of prompt "a" is p, that of "b" 1000 + p."""

    def __init__(self, can_move: bool = True) -> None:
        self.kept = ReferenceQueries(GEOMETRY, torch.device("cpu"), can_move)
        self.computed: dict[str, int] = {}

    def begin(self, request_id: str, num_cached: int = 0) -> None:
        self.computed[request_id] = num_cached

    def step(self, chunks: dict[str, int], served_by_decode: str = "", descriptions: int = 1):
        """Some more tokens of each prompt; rows of `served_by_decode` come first and are unseen."""
        queries, rows = [], []
        for request_id in sorted(chunks, key=lambda one: one not in served_by_decode):
            first, count = self.computed.get(request_id, 0), chunks[request_id]
            self.computed[request_id] = first + count
            queries.append(self._number(request_id) + torch.arange(first, first + count))
            last_token = sum(map(len, queries)) - 1
            if request_id not in served_by_decode:
                rows.append((request_id, LONG, count, first + count, last_token))
        for _ in range(descriptions):
            self.kept.begin_batch()
            for row in rows:
                self.kept.begin_row(*row)
        of_batch = torch.cat(queries).float()[:, None, None].expand(-1, 4, 8)
        for layer in range(2):
            self.kept.observe(layer, of_batch + 0.5 * layer)

    @staticmethod
    def _number(request_id: str) -> int:
        return 1000 * (ord(request_id) - ord("a"))

    def tokens(self, request_id: str) -> list[int]:
        """The prompt's tokens whose queries are kept, proved to be in order and at their places."""
        references = self.kept.of(request_id)
        if references is None:
            return []
        queries = references.queries - self._number(request_id)
        assert torch.equal(queries[:, 1], queries[:, 0] + 0.5)
        assert (queries[:, 0] == queries[:, 0, :1, :1]).all()
        tokens = queries[:, 0, 0, 0].int().tolist()
        assert tokens == [LONG - references.behind + i for i in range(len(tokens))]
        return tokens


def last(count: int) -> list[int]:
    return list(range(LONG - count, LONG))


@pytest.fixture(autouse=True)
def room(monkeypatch):
    monkeypatch.setattr(reference_queries, "reference_positions", lambda geometry: ROOM)


def test_all_prompts_together_have_256_mib_or_what_one_needs():
    of_token = 2 * 4 * 8 * 4  # bytes
    assert reference_positions(GEOMETRY) == (256 << 20) // of_token
    llama = replace(GEOMETRY, num_layers=32, num_q_heads=32, head_dim=128, dtype=torch.bfloat16)
    assert reference_positions(llama) == 8 * 128
    huge = replace(GEOMETRY, num_layers=100_000, head_dim=256)
    assert reference_positions(huge) == 128


@pytest.mark.parametrize(("can_move", "count"), [(True, 128), (False, 64)])
def test_prompts_get_the_room_that_others_leave_and_say_what_they_lack(can_move, count):
    prefills = Prefills(can_move)
    prefills.step(dict.fromkeys("abcd", LONG))
    left = ROOM
    for request_id in "abcd":
        given = min(count, left)
        left -= given
        assert prefills.tokens(request_id) == last(given)
        assert prefills.kept.num_without_room(request_id) == count - given


def test_cached_tokens_and_rows_of_the_decode_kernel_are_no_lack_of_room():
    prefills = Prefills()
    prefills.begin("a", num_cached=280)
    prefills.begin("b", num_cached=299)
    prefills.step({"a": 20, "b": 1, "c": 298}, served_by_decode="b")
    prefills.step({"c": 2}, served_by_decode="c")
    assert prefills.tokens("a") == last(20)
    assert prefills.tokens("b") == []
    assert prefills.tokens("c") == last(128)[:-2]
    assert [prefills.kept.num_without_room(one) for one in "abc"] == [0, 0, 0]


def test_a_cached_prompt_lacks_only_queries_of_what_is_computed():
    prefills = Prefills()
    prefills.step(dict.fromkeys("ab", LONG))
    prefills.begin("c", num_cached=280)
    prefills.step({"c": 20})
    assert prefills.kept.num_without_room("c") == 20


def test_a_prompt_takes_no_room_before_its_last_tokens():
    prefills = Prefills()
    prefills.step(dict.fromkeys("ab", LONG - 128))
    assert prefills.kept.num_without_room("a") == 0
    prefills.step({"c": LONG})
    assert prefills.tokens("c") == last(128)


@pytest.mark.parametrize("others", ["a", "ab"])
def test_a_prompt_takes_the_room_that_others_leave_before_its_first_query_is_kept(others):
    """At first there is room for 72 tokens or for none, and the chunk ends before the last 72."""
    prefills = Prefills()
    prefills.step(dict.fromkeys(others, LONG))
    prefills.step({"c": LONG - 100})
    assert prefills.tokens("c") == []
    prefills.kept.forget("a")
    prefills.step({"c": 40})
    prefills.step({"c": 60})
    assert prefills.tokens("c") == last(100)
    assert prefills.kept.num_without_room("c") == 28
    prefills.kept.forget("c")
    prefills.kept.forget("b")
    assert prefills.kept._room == ROOM


def test_a_prompt_keeps_its_number_of_queries_once_the_first_is_kept():
    prefills = Prefills()
    prefills.step({"a": LONG})
    prefills.step({"b": LONG - 60})
    prefills.kept.forget("a")
    prefills.step({"b": 60})
    assert prefills.tokens("b") == last(72)
    assert prefills.kept.num_without_room("b") == 56


@pytest.mark.parametrize("computed", [LONG - 127, LONG - 50, LONG])
def test_a_prompt_that_leaves_gives_its_room_back(computed):
    """Finished, aborted or preempted; a preempted prompt takes room again when it comes back."""
    prefills = Prefills()
    prefills.step({"a": computed, "b": computed})
    for request_id in "ab":
        prefills.kept.forget(request_id)
        prefills.kept.forget(request_id)  # nothing more happens
        assert prefills.tokens(request_id) == []
        assert prefills.kept.num_without_room(request_id) == 0
    assert prefills.kept._room == ROOM
    prefills.begin("b")
    prefills.step({"b": LONG})
    assert prefills.tokens("b") == last(128)


def test_a_step_that_is_described_twice_takes_its_room_once():
    prefills = Prefills()
    prefills.step({"a": LONG, "b": LONG - 100, "c": LONG - 50}, descriptions=2)
    prefills.step({"b": 100, "c": 50}, descriptions=2)
    assert [prefills.tokens(one) for one in "abc"] == [last(128), last(72), []]
    assert [prefills.kept.num_without_room(one) for one in "abc"] == [0, 56, 128]


@pytest.mark.parametrize(
    ("before", "expected"),
    [(90, last(128)[:90]), (10, last(117))],
    ids=["the first part is longer", "the last part is longer"],
)
@pytest.mark.parametrize("descriptions", [1, 2])
def test_of_queries_before_and_behind_a_row_of_the_decode_kernel_the_longer_part_counts(
    before, expected, descriptions
):
    """The query between is not seen, and nothing takes its place."""
    prefills = Prefills()
    prefills.step({"a": LONG - 128 + before}, descriptions=descriptions)
    prefills.step({"a": 1}, served_by_decode="a", descriptions=descriptions)
    rest = 127 - before
    prefills.step({"a": rest - 5}, descriptions=descriptions)
    prefills.step({"a": 5}, descriptions=descriptions)
    assert prefills.tokens("a") == expected
    assert prefills.kept.num_without_room("a") == 0
