import itertools
import random

import pytest

from vllm_heterocache.evaluation.rouge import common_words, rouge_l, rouge_lsum


def longest(first, second):
    """Length of the longest common subsequence, by trying all."""
    for size in range(len(first), -1, -1):
        for picked in itertools.combinations(first, size):
            rest = iter(second)
            if all(word in rest for word in picked):
                return size


@pytest.mark.parametrize("shorten_first", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_common_words_are_a_longest_common_subsequence(seed, shorten_first):
    rng = random.Random(seed)
    first = rng.choices("abcd", k=rng.randint(0, 8))
    second = rng.choices("abcd", k=rng.randint(0, 8))
    found = common_words(first, second, shorten_first)
    assert len(found) == longest(first, second)
    assert found == sorted(set(found))
    rest = iter(second)
    assert all(first[i] in rest for i in found)


def test_which_of_two_subsequences_counts():
    assert common_words("ab", "ba", shorten_first=True) == [0]
    assert common_words("ab", "ba", shorten_first=False) == [1]


def f1(hits, num_words, num_wanted):
    precision, recall = hits / num_words, hits / num_wanted
    return 2 * precision * recall / (precision + recall)


def test_union_over_sentences_of_the_paper():
    """Lin 2004, section 3.2: the union of "w1 w2" and "w1 w3 w5" has 4 of 5 words."""
    assert rouge_l("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(
        f1(4, 8, 5)  # distinct words of the summary: w1 w2 w3 w5 w6 w7 w8 w9
    )
    assert rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(
        f1(4, 10, 5)
    )


def test_equal_texts_score_one_and_strange_ones_zero():
    text = "A first sentence. And, a second one"
    assert rouge_l(text, text) == pytest.approx(1, abs=1e-6)
    assert rouge_lsum(text, text) == 1
    for score in (rouge_l, rouge_lsum):
        assert score("zzz", text) == score("", text) == score("...", text) == 0


def test_words_differ_between_the_variants():
    assert rouge_l("Cat, sat", "cat sat") == pytest.approx(0.5), "case and commas count"
    assert rouge_lsum("Cat, sat", "cat sat") == 1


def test_repeated_words_count_as_often_as_they_stand_in_both():
    assert rouge_lsum("a a a b", "a b") == pytest.approx(f1(2, 4, 2))
    assert rouge_lsum("a\na\na", "a\nb") == pytest.approx(f1(1, 3, 2))
    assert rouge_l("a a a b", "a b") == pytest.approx(1, abs=1e-6)
