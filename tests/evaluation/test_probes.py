"""Suite `probes` without an engine: every question can be answered from what stands before it."""

import collections
import itertools
import json
import random
import re

import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.engine.turns import Conversation
from vllm_heterocache.evaluation.haystacks import HAYSTACKS
from vllm_heterocache.evaluation.sample import FREE, SuiteSettings
from vllm_heterocache.evaluation.suites import make_suite
from vllm_heterocache.evaluation.suites.probes.copying import ANSWER_TOKENS, CUE_TOKENS
from vllm_heterocache.evaluation.suites.probes.graph_walks import draw_graph, parents_of, reached
from vllm_heterocache.evaluation.suites.probes.probe import Probe, lay_out, prefixes
from vllm_heterocache.evaluation.suites.probes.source import fitting, of_one_length
from vllm_heterocache.evaluation.suites.probes.suite import TASKS

TOKENIZER = Pieces(bos=True)
FACT = r"The special magic number for (\w+) is: (\d{5})"
NEEDLE = r"One of the special magic numbers for (\S+) is: (\d{7})"
LENGTH = 3000


def samples(*tasks, tokenizer=TOKENIZER, **settings):
    settings = {"lengths": (LENGTH,), "num_samples": 1, **settings}
    suite = make_suite("probes")
    return list(suite.samples(tokenizer, SuiteSettings(tasks=tasks or None, **settings)))


def perfect_output(sample):
    output = list(sample.forced)
    for probe in sample.meta["probes"]:
        for position, answer in zip(probe["positions"], probe["answers"], strict=True):
            output[position : position + len(answer)] = answer
    return output


def texts_of(sample):
    """Of the prompt, and of an output that is right."""
    return TOKENIZER.decode(sample.prompt), TOKENIZER.decode(perfect_output(sample))


@pytest.mark.parametrize("length", [2500, 6001])
def test_every_task_fills_its_length_and_its_right_output_scores_1(length):
    found = samples(lengths=(length,), num_samples=2)
    assert [s.task for s in found] == [name for name in TASKS for _ in range(2)]
    assert len({s.id for s in found}) == len({tuple(s.prompt) for s in found}) == len(found)
    suite = make_suite("probes")
    for sample in found:
        whole = len(sample.prompt) + (len(sample.forced) if sample.task == "conversation" else 0)
        assert 0.98 * length < whole <= length, sample.id
        assert TOKENIZER.decode(sample.prompt).startswith(f"<s>Text {sample.task}/{length}/8/0.")
        assert sample.max_tokens == len(sample.forced)
        assert sample.forced[0] != FREE, "the prompt ends before the first question"
        output = perfect_output(sample)
        assert FREE not in output
        right = suite.right(sample, output)
        assert right == [True] * len(right)
        assert suite.score(sample, output, "") == {"score": 1.0, "prefix": 1.0}
        assert suite.right(sample, sample.forced) == [False] * len(right)
        json.dumps(sample.meta)


def test_seed_decides_everything_and_titles_keep_caches_apart():
    assert samples(seed=1) == samples(seed=1)
    for one, other in zip(samples(seed=1), samples(seed=2), strict=True):
        assert one.prompt != other.prompt and one.id != other.id
    beginnings = {tuple(s.prompt[:16]) for s in samples(lengths=(LENGTH, 4000), num_samples=2)}
    assert len(beginnings) == 4 * len(TASKS)


@pytest.mark.parametrize("questions", [1, 5])
def test_questions_are_as_many_as_asked_for(questions):
    for sample in samples(extra={"questions": questions}):
        expected = {"conversation": 20, "graph_steps": 3 * questions}
        assert len(sample.meta["probes"]) == expected.get(sample.task, questions)


def test_lengths_and_answers_hold_with_a_real_tokenizer(long_model):
    from transformers import AutoTokenizer

    suite, tokenizer = make_suite("probes"), AutoTokenizer.from_pretrained(long_model)
    for sample in samples(tokenizer=tokenizer, lengths=(4000,)):
        whole = len(sample.prompt) + (len(sample.forced) if sample.task == "conversation" else 0)
        assert 0.98 * 4000 < whole <= 4000
        assert suite.score(sample, perfect_output(sample), "") == {"score": 1.0, "prefix": 1.0}
        text = tokenizer.decode(sample.prompt + perfect_output(sample))
        for probe in sample.meta["probes"]:
            for answer in map(tokenizer.decode, probe["answers"]):
                assert text.count(answer.strip()) >= 2, "it is read before it is given"


# --- slots ---


def test_slots_stand_between_what_is_forced():
    forced, laid_out = lay_out([Probe([[1, 2], [3]], [[7, 8], [9]]), Probe([[4]], [[5, 6]])])
    assert forced == [1, 2, FREE, FREE, 3, FREE, 4, FREE, FREE]
    assert [probe["positions"] for probe in laid_out] == [[2, 5], [7]]
    assert prefixes(laid_out[0], [1, 2, 7, 0, 3, 9]) == [0.5, 1]
    assert prefixes(laid_out[0], [1, 2, 9, 8, 3, 7]) == [0, 0], "in the order of the slots"
    assert prefixes(laid_out[0], [1, 2, 7]) == [0.5, 0], "an output may be cut short"


def test_answers_in_any_order_count_once():
    forced, (probe,) = lay_out([Probe([[1]] * 3, [[7, 8], [7, 9], [5, 5]], any_order=True)])
    assert len(forced) == 9
    assert prefixes(probe, [1, 5, 5, 1, 7, 9, 1, 7, 8]) == [1, 1, 1]
    assert prefixes(probe, [1, 7, 9, 1, 7, 9, 1, 7, 9]) == [0.5, 1, 0]


def test_answers_in_any_order_have_one_length():
    encode = TOKENIZER.encode
    chosen = of_one_length(encode, ["calm", "ancientness", "bold", "elastically", "sour"])
    assert chosen == ["calm", "bold", "sour"]
    for task in ("multivalue", "graph_steps", "graph_bfs", "graph_parents"):
        for probe in samples(task)[0].meta["probes"]:
            assert probe["any_order"] and len(set(map(len, probe["answers"]))) == 1
            assert len(set(map(tuple, probe["answers"]))) == len(probe["answers"])


def test_lines_are_taken_while_they_fit():
    lines = [[1] * 4, [2] * 3, [3] * 2]
    assert fitting(lines, 9) == lines
    assert fitting(lines, 8) == lines[:2]
    assert fitting(lines, 3) == []


# --- tasks ---


def test_multikey_is_needles_alone_and_asks_for_some():
    (sample,) = samples("multikey")
    prompt, output = texts_of(sample)
    hidden = dict(re.findall(NEEDLE, prompt))
    rest = re.sub(NEEDLE + r"\.\n", "", prompt)
    assert len(hidden) > 80 and rest == "<s>Text multikey/3000/8/0.0\n\n"
    asked = dict(re.findall("\n" + NEEDLE, output))
    assert len(asked) == 8 and asked.items() <= hidden.items()


def test_multivalue_asks_for_all_four_values_of_each_key():
    (sample,) = samples("multivalue")
    prompt, output = texts_of(sample)
    hidden, asked = collections.defaultdict(set), collections.defaultdict(set)
    for found, text in ((hidden, prompt), (asked, output)):
        for key, value in re.findall(NEEDLE, text):
            found[key].add(value)
    assert asked == hidden and len(hidden) == 8
    assert {len(values) for values in hidden.values()} == {4}


@pytest.mark.parametrize("haystack", ["prose", "code"])
def test_copied_passages_stand_once_and_go_on_as_expected(haystack):
    (sample,) = samples(f"copy_{haystack}")
    text, ends = sample.prompt, []
    for probe in sample.meta["probes"]:
        (position,), (answer,) = probe["positions"], probe["answers"]
        cue = sample.forced[position - CUE_TOKENS : position]
        found = [i for i in range(len(text)) if text[i : i + CUE_TOKENS] == cue]
        assert len(found) == 1 and len(answer) == ANSWER_TOKENS
        ends_alike = [i for i in range(len(text)) if text[i : i + 4] == cue[-4:]]
        assert ends_alike == [found[0] + CUE_TOKENS - 4], "what it ends with stands once too"
        after = found[0] + CUE_TOKENS
        assert text[after : after + ANSWER_TOKENS] == answer
        assert TOKENIZER.decode(text[: found[0]]).endswith("\n"), "it begins a line"
        ends.append(after + ANSWER_TOKENS)
    assert len(ends) == 8 and ends != sorted(ends) and max(ends) - min(ends) > 0.4 * len(text)
    assert all(b - a >= CUE_TOKENS + ANSWER_TOKENS for a, b in itertools.pairwise(sorted(ends)))
    whole = TOKENIZER.decode(text).partition("\n\n")[2]
    assert whole in HAYSTACKS[haystack]()


def test_records_become_json():
    (sample,) = samples("json")
    prompt, output = texts_of(sample)
    told = dict(re.findall(r"(The \w+ for \w+ is) \"?(\w+)\"?\.", prompt))
    asked = json.loads(output + "}]")
    assert len(told) == 3 * 16 and len(asked) == 8
    for record in asked:
        kinds = [re.fullmatch(r"the (\w+) for (\w+) is", key).groups() for key in record]
        assert [kind for kind, _ in kinds] == ["carrier", "cargo", "weight"]
        assert len({place for _, place in kinds}) == 1
        for key, value in record.items():
            assert told.pop(key.replace("the", "The", 1)) == str(value)
    assert len(samples("json")[0].meta["probes"][0]["answers"]) == 3


def test_conversation_asks_in_each_turn_for_what_was_said_in_an_earlier_one():
    (sample,) = samples("conversation")
    assert sample.in_turns
    turns, said, asked = Conversation(sample), [], []
    lengths = []
    for probe in sample.meta["probes"]:
        turn = turns.next_turn()
        lengths.append(len(turn.prompt))
        text = TOKENIZER.decode(turn.prompt)
        key = re.search(r"\n\nAssistant: The special magic number for (\w+) is:$", text)[1]
        said.append(dict(re.findall(FACT + r"\.", text)))
        (answer,) = probe["answers"]
        assert TOKENIZER.decode(answer) == " " + said[-1][key]
        before = said[-2] if len(said) > 1 else said[0]
        assert key in before, "not stated in the turn that asks for it"
        asked.append(key)
        turns.take(answer, "")
    assert turns.next_turn() is None
    assert len(asked) == len(set(asked)) == 20
    assert [len(facts) for facts in said] == list(range(11, 31)), "each turn states one"
    of_text = set(said[0]) & set(asked[::2])
    assert len(of_text) == 10 and not of_text & set(asked[1::2])
    steps = {after - before for before, after in itertools.pairwise(lengths)}
    assert max(steps) - min(steps) <= 8 and lengths[-1] > 0.98 * LENGTH


def test_phase_switch_asks_for_the_start_after_tool_output():
    (sample,) = samples("phase_switch")
    prompt, output = texts_of(sample)
    hidden = dict(re.findall(FACT, prompt))
    start = TOKENIZER.decode(sample.prompt[: LENGTH // 10 + 40])
    assert len(hidden) == 8 and dict(re.findall(FACT, start)) == hidden
    phases = output.split("\n\n<tool_response>\n")[1:]
    asked = {}
    for phase in phases:
        lines, question = phase.split("</tool_response>\n")
        for line in lines.splitlines():
            assert json.loads(line).keys() == {"path", "line", "match", "ms"}
        assert 96 <= len(TOKENIZER.encode(lines)) < 150
        asked |= dict([re.fullmatch(FACT, question).groups()])
    assert len(phases) == 8 and asked == hidden


def graph_of(prompt):
    """The edges that a prompt lists; every node has two, to others."""
    edges = re.findall(r"^(\S+) -> (\S+)$", prompt.rpartition("edges:\n")[2], re.MULTILINE)
    assert len(edges) == len(set(edges)) and not any(one == other for one, other in edges)
    assert set(collections.Counter(one for one, _ in edges).values()) == {2}
    return edges


@pytest.mark.parametrize(("task", "num_answers"), [("graph_bfs", 4), ("graph_parents", 2)])
def test_answers_of_a_walk_are_those_of_the_graph_in_the_prompt(task, num_answers):
    (sample,) = samples(task)
    prompt, output = texts_of(sample)
    edges = graph_of(prompt)
    asked = re.findall(r"\nOperation: (.+)\nFinal Answer:(.+)", output)
    assert len({operation for operation, _ in asked}) == 8
    for operation, answers in asked:
        node = re.search(r"node (\S+?)(?: with depth 2)?\.$", operation)[1]
        assert set(answers.strip().split(", ")) == by_hand(edges, node, operation)
        assert len(answers.split(",")) == num_answers


def test_steps_of_a_walk_are_the_edges_from_its_nodes_in_turn():
    (sample,) = samples("graph_steps")
    prompt, output = texts_of(sample)
    edges = graph_of(prompt)
    assert sum(len(probe["answers"]) for probe in sample.meta["probes"]) == 8 * 6
    for search in output.split("\nOperation: ")[1:]:
        operation, *steps = search.split("\n")
        node = re.fullmatch(r"Perform a BFS from node (\S+) with depth 2\.", operation)[1]
        walked = [tuple(step.split(" -> ")) for step in steps]
        assert len(set(walked)) == 6 and set(walked) <= set(edges)
        first, second = (other for _, other in walked[:2])
        assert [one for one, _ in walked] == [node] * 2 + [first] * 2 + [second] * 2
        assert {other for _, other in walked[2:]} == by_hand(edges, node, operation)


def by_hand(edges, node, operation):
    if "parents" in operation:
        return {one for one, other in edges if other == node}
    once = {other for one, other in edges if one == node}
    return {other for one, other in edges if one in once} - once - {node}


def test_walks_of_a_small_graph():
    graph = {"a": ["b", "c"], "b": ["a", "d"], "c": ["d", "b"], "d": ["a", "c"]}
    assert reached(graph, "a", 1) == {"b", "c"} and reached(graph, "a", 2) == {"d"}
    assert reached(graph, "a", 3) == set()
    assert parents_of(graph) == {"a": {"b", "d"}, "b": {"a", "c"}, "c": {"a", "d"}, "d": {"b", "c"}}
    drawn = draw_graph(random.Random(0), list("abc"))
    assert all(sorted([node, *children]) == list("abc") for node, children in drawn.items())


# --- settings ---


def test_turns_ask_the_same_of_further_requests():
    plain, turns = samples(), samples(extra={"turns": True})
    assert [(s.prompt, s.forced) for s in turns] == [(s.prompt, s.forced) for s in plain]
    assert all(s.in_turns for s in turns)
    assert [s.task for s in plain if s.in_turns] == ["conversation"]
    for one, other in zip(plain, turns, strict=True):
        assert (one.id == other.id) == (one.task == "conversation")


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused(task):
    with pytest.raises(ValueError, match=rf"--lengths 100 is too short for --tasks {task}"):
        samples(task, lengths=(100,))


@pytest.mark.parametrize(
    ("task", "questions", "most"), [("json", 33, 32), ("phase_switch", 65, 64)]
)
def test_more_questions_than_names_are_refused(task, questions, most):
    with pytest.raises(ValueError, match=f"questions={questions} is refused: .* {task} has {most}"):
        samples(task, extra={"questions": questions})


def test_text_that_repeats_itself_has_no_passage_to_ask_for(monkeypatch):
    monkeypatch.setitem(HAYSTACKS, "prose", lambda: "one and the same line\n" * 5000)
    with pytest.raises(ValueError, match="--tasks copy_prose finds 0 passages"):
        samples("copy_prose")


def test_graph_without_nodes_to_ask_for_is_refused():
    """Of about ten nodes, none may have exactly two parents."""
    refused = []
    for seed in range(40):
        try:
            samples("graph_parents", lengths=(200,), seed=seed, extra={"questions": 1})
        except ValueError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 20
    assert set(refused) == {
        "--tasks graph_parents with --set questions=1 finds 0 nodes to ask for at --lengths 200; "
        "take a larger length or fewer questions"
    }


def test_unknown_tasks_and_settings_are_refused():
    with pytest.raises(ValueError, match="--tasks copying is not a task of --suite probes; choose"):
        samples("copying")
    with pytest.raises(ValueError, match="did you mean questions"):
        samples(extra={"question": 3})
