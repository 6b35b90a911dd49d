from vllm_heterocache.evaluation import text_metrics as metrics


def test_string_matches_count_answers_in_any_case():
    assert metrics.string_match_all("It is ALPHA,\x00beta", ["alpha", "Beta", "gamma", "7"]) == 0.5
    assert metrics.string_match_part("nothing but 123456", ["alpha", "2345"]) == 1
    assert metrics.string_match_part("", ["alpha"]) == 0


def test_normalisation_drops_case_punctuation_and_articles():
    assert metrics.normalize_answer(" The  U.S.A., an (old) theatre ") == "usa old theatre"


def test_word_overlap_counts_distinct_words_of_the_truth():
    assert metrics.word_overlap("Eat! eat a sandwich", "eat a sandwich and sit") == 0.5
