"""Chains made with a tokenizer of one token per character."""

import hashlib
import random
import re

import pytest

from vllm_heterocache.evaluation.chain import ANSWER_DIGITS, KEYS, WORDINGS, Chain, make_chain
from vllm_heterocache.evaluation.forced_tokens import FREE


class Characters:
    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(character) for character in text]


def decode(tokens):
    return "".join(map(chr, tokens))


HAYSTACK = "".join(random.Random(0).choices("abcdefgh", k=5000))


def build(num_tokens=2000, num_facts=5, seed=0, haystack=HAYSTACK, wording="magic") -> Chain:
    return make_chain(Characters(), haystack, num_tokens, num_facts, seed, WORDINGS[wording])


def facts_in(prompt):
    return dict(re.findall(r" The special magic number for (\w+) is: (\d+)\.", decode(prompt)))


def perfect_output(chain):
    output = list(chain.forced)
    for start, answer in zip(chain.positions, chain.answers, strict=True):
        output[start : start + len(answer)] = answer
    return output


@pytest.mark.parametrize("num_tokens", [500, 1111, 4000])
@pytest.mark.parametrize("num_facts", [1, 3, 7])
def test_prompt_has_the_wanted_length_and_ends_with_the_first_question(num_tokens, num_facts):
    chain = build(num_tokens, num_facts)
    assert len(chain.prompt) == num_tokens
    facts = facts_in(chain.prompt)
    assert len(facts) == num_facts
    question = re.search(r"\n\n\nThe special magic number for (\w+) is:$", decode(chain.prompt))
    assert decode(chain.answers[0]) == " " + facts[question[1]]


def test_every_fact_is_asked_for_once_and_answered_right():
    chain = build(num_facts=6)
    facts = facts_in(chain.prompt)
    text = decode(chain.prompt)[-60:] + decode(perfect_output(chain))
    asked = re.findall(r"\nThe special magic number for (\w+) is: (\d+)", text)
    assert dict(asked) == facts and len(asked) == 6
    assert set(facts) <= set(KEYS)
    assert all(len(value) == ANSWER_DIGITS for value in facts.values())


def test_only_answers_are_left_to_the_model():
    chain = build()
    free = {index for index, token in enumerate(chain.forced) if token == FREE}
    spans = [
        set(range(start, start + len(answer)))
        for start, answer in zip(chain.positions, chain.answers, strict=True)
    ]
    assert free == set.union(*spans) and len(free) == sum(map(len, spans))
    assert chain.positions[0] == 0, "the first question is in the prompt"
    assert len(chain.forced) == chain.positions[-1] + len(chain.answers[-1])


def test_haystack_is_whole_around_the_facts():
    chain = build(num_facts=4)
    text = re.sub(r" The special magic number for \w+ is: \d+\.", "", decode(chain.prompt))
    filler = text.split("\n\n")[0]
    assert filler == HAYSTACK[: len(filler)]


def test_seed_decides_everything():
    assert build(seed=3) == build(seed=3)
    one, other = build(seed=3), build(seed=4)
    assert facts_in(one.prompt) != facts_in(other.prompt)


def test_chains_stay_the_recorded_ones():
    """docs/results/forced_chain.jsonl was measured when there were 32 keys and one wording."""
    chain = build(num_tokens=4500, num_facts=16, seed=3)
    digest = hashlib.sha256(decode(chain.prompt).encode()).hexdigest()
    assert digest[:16] == "29fecb3227f3eff5"
    assert set(facts_in(chain.prompt)) <= set(KEYS[:32])
    assert not set(facts_in(build(num_tokens=4800, num_facts=40).prompt)) <= set(KEYS[:32])


def test_phrases_are_copied_word_for_word():
    chain = build(num_facts=3, wording="copy")
    text = decode(chain.prompt)
    phrases = dict(re.findall(r" The secret phrase of (\w+) is: ([a-z ]+)\.", text))
    assert len(phrases) == 3 and all(len(set(p.split())) == 12 for p in phrases.values())
    first = re.search(r"\nThe secret phrase of (\w+) is:$", text)[1]
    assert decode(chain.answers[0]) == " " + phrases[first]
    assert sorted(map(decode, chain.answers)) == sorted(" " + p for p in phrases.values())
    # in the text the answer follows the words that ask for it
    assert all(f"is:{decode(answer)}." in text for answer in chain.answers)


def test_tracking_states_the_number_for_another_name_only():
    chain = build(num_facts=6, wording="tracking")
    text = decode(chain.prompt)
    stated = facts_in(chain.prompt)
    links = dict(re.findall(r" number for (\w+) is the same as the one for (\w+)\.", text))
    assert len(stated) == len(links) == 6 and set(links.values()) == set(stated)
    assert not set(links) & set(stated), "a name that is asked for has no number of its own"
    whole = text[-60:] + decode(perfect_output(chain))
    asked = dict(re.findall(r"\nThe special magic number for (\w+) is: (\d+)", whole))
    assert asked == {key: stated[other] for key, other in links.items()}
    with pytest.raises(ValueError, match="num_facts=33 is more than the 64 keys allow"):
        build(num_facts=33, wording="tracking")


def test_places_and_order_vary():
    starts, orders = set(), set()
    for seed in range(20):
        chain = build(seed=seed, num_facts=3)
        starts.add(decode(chain.prompt).index(" The"))
        keys = list(facts_in(chain.prompt))
        asked = re.findall(r"for (\w+) is:$", decode(chain.prompt))[0]
        orders.add(keys.index(asked))
    assert len(starts) > 10
    assert orders == {0, 1, 2}


def test_perfect_output_is_right_and_each_wrong_digit_is_noticed():
    chain = build(num_facts=4)
    output = perfect_output(chain)
    assert chain.correct(output) == [True] * 4
    for index, (start, answer) in enumerate(zip(chain.positions, chain.answers, strict=True)):
        for place in range(start, start + len(answer)):
            wrong = list(output)
            wrong[place] += 1
            assert chain.correct(wrong) == [i != index for i in range(4)]


def test_tokens_behind_the_chain_do_not_matter_and_missing_ones_are_an_error():
    chain = build()
    output = perfect_output(chain)
    assert all(chain.correct([*output, 1, 2]))
    with pytest.raises(ValueError, match=f"{len(output) - 1} of {len(output)}"):
        chain.correct(output[:-1])


def test_sampling_runs_greedily_to_the_end_of_the_chain():
    from vllm import SamplingParams

    chain = build()
    params = SamplingParams(**chain.sampling_kwargs())
    assert params.temperature == 0 and params.ignore_eos
    assert params.max_tokens == len(chain.forced)
    assert params.extra_args == {"forced_tokens": chain.forced}


def test_impossible_chains_are_refused_in_words():
    with pytest.raises(ValueError, match=f"num_facts={len(KEYS) + 1} is more than the {len(KEYS)}"):
        build(num_facts=len(KEYS) + 1)
    assert len(facts_in(build(num_tokens=4000, num_facts=len(KEYS)).prompt)) == len(KEYS)
    with pytest.raises(ValueError, match="the haystack has 100 tokens and"):
        build(haystack=HAYSTACK[:100])


@pytest.mark.parametrize("num_tokens", [1, 100, 250])
def test_prompt_too_short_for_its_facts_is_refused(num_tokens):
    """Five facts and a question are at least 258 characters."""
    with pytest.raises(ValueError, match=f"num_tokens={num_tokens} leaves no room"):
        build(num_tokens=num_tokens, num_facts=5)
