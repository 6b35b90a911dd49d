import pytest
from eval_tokenizers import Pieces

from vllm_heterocache.evaluation.prompt import largest_fitting, make_frame, truncate_middle


@pytest.mark.parametrize("bos", [False, True])
def test_plain_prompt_is_the_text_after_the_beginning_of_sequence(bos):
    tokenizer = Pieces(bos=bos)
    ids = make_frame(tokenizer, False).ids("What is it?", " It is")
    assert tokenizer.decode(ids) == "<s>" * bos + "What is it? It is"


def test_chat_prompt_is_one_turn_and_the_answer_begins_after_it():
    tokenizer = Pieces(bos=True, chat=True)
    ids = make_frame(tokenizer, True).ids("What is it?", " It is")
    assert tokenizer.decode(ids) == "<s>[user]What is it?[/user][assistant] It is"


def test_chat_prompt_is_what_the_tokenizer_makes_of_the_turn(small_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    turn = [{"role": "user", "content": "What is it?"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.encode(whole, add_special_tokens=False)
    assert make_frame(tokenizer, True).ids("What is it?") == expected


def test_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match="--set chat=true needs a model with a chat template"):
        make_frame(Pieces(), True)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length", [31, 40, 63])
def test_truncation_takes_the_middle_and_leaves_the_frame(chat, length):
    tokenizer = Pieces(bos=True, chat=chat)
    frame = make_frame(tokenizer, chat)
    text = "begin " + "middle " * 100 + "end"
    ids, cut = frame.truncated(text, " So", length)
    whole = tokenizer.decode(ids)
    assert cut and len(ids) == length
    assert whole.startswith("<s>[user]begin" if chat else "<s>begin")
    assert whole.endswith("end[/user][assistant] So" if chat else "end So")
    assert frame.truncated(text, " So", 1000) == (frame.ids(text, " So"), False)


def test_length_without_room_for_text_is_refused():
    frame = make_frame(Pieces(chat=True), True)
    with pytest.raises(ValueError, match="--lengths 9 leaves no room"):
        frame.truncated("some text", "", 9)


@pytest.mark.parametrize("room", [2, 3, 6, 7])
def test_middle_truncation_keeps_both_ends(room):
    tokens = list(range(10))
    kept = truncate_middle(tokens, room)
    head = (room + 1) // 2
    assert kept == tokens[:head] + tokens[10 - (room - head) :]
    assert truncate_middle(tokens, 10) == truncate_middle(tokens, 11) == tokens


@pytest.mark.parametrize(("per_unit", "offset"), [(1, 0), (3, 50), (27, 111), (0.3, 7)])
@pytest.mark.parametrize("room", [163, 1000, 77777])
def test_largest_fitting_size_is_found_in_few_trials(per_unit, offset, room):
    tried = []

    def count(size):
        tried.append(size)
        return int(offset + per_unit * size)

    size = largest_fitting(count, room, 1, "it")
    assert count(size) <= room < count(size + 1)
    assert len(tried) < 15


def test_uneven_counts_never_pass_the_room():
    def count(size):
        return 5 * size + size % 7

    for room in range(20, 400):
        assert room - 12 < count(largest_fitting(count, room, 2, "it")) <= room


def test_what_does_not_fit_at_all_is_named():
    with pytest.raises(ValueError, match="--lengths 63 is too short for --tasks vt, which takes 9"):
        largest_fitting(lambda size: 90 + size, 63, 3, "--tasks vt")
