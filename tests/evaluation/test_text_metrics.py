import pytest

from vllm_heterocache.evaluation import text_metrics as metrics


def test_string_matches_count_answers_in_any_case():
    assert metrics.string_match_all("It is ALPHA,\x00beta", ["alpha", "Beta", "gamma", "7"]) == 0.5
    assert metrics.string_match_part("nothing but 123456", ["alpha", "2345"]) == 1
    assert metrics.string_match_part("", ["alpha"]) == 0


def test_normalisation_drops_case_punctuation_and_articles():
    assert metrics.normalize_answer(" The  U.S.A., an (old) theatre ") == "usa old theatre"


@pytest.mark.parametrize(
    "text, truth, score",
    [
        ("the Eiffel Tower", "Eiffel tower.", 1.0),
        ("in Paris near a river", "Paris", 2 * 0.25 / 1.25),  # precision 1/4, recall 1
        ("x x y", "x z", 2 / 5),  # one of three, one of two
        ("", "x", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
    ],
)
def test_qa_f1(text, truth, score):
    assert metrics.qa_f1(text, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    "text, score", [("7", 1), ("7 or 8", 0.5), ("17", 0), ("none", 0), ("7, 7, 1", 2 / 3)]
)
def test_numbers(text, score):
    assert metrics.number_share(text, "7") == pytest.approx(score)
    assert metrics.paragraph_retrieval(text, "Paragraph 7") == pytest.approx(score)


def test_retrieval_truth_of_another_form_is_refused():
    with pytest.raises(ValueError, match="'7' is not of the form"):
        metrics.paragraph_retrieval("7", "7")


@pytest.mark.parametrize(
    "text, score",
    [
        ("Type: Date", 1),
        ("Date or City", 0.5),
        ("Invention, book and other creative piece", 0),
        ("", 0),
    ],
)
def test_classification_shares_the_point(text, score):
    classes = ["Date", "City", "Invention, book and other creative piece"]
    assert metrics.classification(text, "Date", classes) == score


def test_class_inside_the_right_ones_name_does_not_count():
    assert metrics.classification("Other number", "Other number", ["number", "Other number"]) == 1
    assert metrics.classification("number", "Other number", ["number", "Other number"]) == 0


@pytest.mark.parametrize(
    "text, score",
    [
        ("\n# a remark\nreturn x\nmore", 1),
        ("```python\nreturn x", 1),
        ("return y", 0.88),  # 7 of 8 characters: 87.5 rounds to the even 88
        ("# only a remark", 0),
        ("", 0),
    ],
)
def test_code_similarity_is_of_the_first_line_of_code(text, score):
    assert metrics.code_similarity(text, "return x") == score


def test_word_overlap_counts_distinct_words_of_the_truth():
    assert metrics.word_overlap("Eat! eat a sandwich", "eat a sandwich and sit") == 0.5
