"""The states of a prompt: every transition from every state."""

import pytest

from vllm_heterocache.scheduler.prompt import Prompt, PromptState

ADMITTED, ANNOUNCED, ORDERED, COMPACTED, DENSE, KEPT_DENSE = PromptState
BLOCKS = ["a block", "another"]

TRANSITIONS = {
    "admit": lambda prompt: prompt.admit(300),
    "announce": Prompt.announce,
    "stay_dense": Prompt.stay_dense,
    "order": lambda prompt: prompt.order(7, BLOCKS),
    "compact": Prompt.compact,
    "refuse": Prompt.refuse,
}
ALLOWED = {
    ("admit", ADMITTED): ADMITTED,
    ("admit", KEPT_DENSE): KEPT_DENSE,
    ("announce", ADMITTED): ANNOUNCED,
    ("stay_dense", ADMITTED): DENSE,
    ("order", ANNOUNCED): ORDERED,
    ("compact", ORDERED): COMPACTED,
    ("refuse", ORDERED): DENSE,
}


def prompt_in(state: PromptState) -> Prompt:
    """A prompt of 200 tokens that holds what a prompt in `state` holds."""
    ordered = state in (ORDERED, COMPACTED)
    return Prompt("a", 200, state, 5 if ordered else None, list(BLOCKS) if ordered else [])


@pytest.mark.parametrize("state", PromptState, ids=lambda state: state.name)
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_transitions_start_from_their_states_alone(transition, state):
    prompt, target = prompt_in(state), ALLOWED.get((transition, state))
    if target is None:
        with pytest.raises(AssertionError, match=f"prompt of a is {state.name}"):
            TRANSITIONS[transition](prompt)
        assert prompt == prompt_in(state), "unchanged"
    else:
        TRANSITIONS[transition](prompt)
        assert prompt.state is target


def test_a_new_prompt_is_admitted_with_the_length_that_the_gate_said_last():
    prompt = Prompt("a")
    assert prompt.state is ADMITTED
    for num_tokens in (200, 203):
        prompt.admit(num_tokens)
        assert prompt.num_tokens == num_tokens


def test_a_compaction_is_held_from_its_order_on():
    prompt = prompt_in(ANNOUNCED)
    prompt.order(7, BLOCKS)
    assert (prompt.ticket, prompt.compact_blocks) == (7, BLOCKS)
    prompt.compact()
    assert (prompt.ticket, prompt.compact_blocks) == (7, BLOCKS)


def test_a_refused_compaction_is_let_go():
    prompt = prompt_in(ORDERED)
    assert prompt.refuse() == (5, BLOCKS)
    assert prompt.ticket is None and prompt.compact_blocks == []


@pytest.mark.parametrize("state", PromptState, ids=lambda state: state.name)
def test_only_a_prefill_can_be_completed(state):
    prompt = prompt_in(state)
    for num_tokens in (199, 200, 201):
        completed = state in (ADMITTED, ANNOUNCED) and num_tokens >= 200
        assert prompt.is_prefilled_by(num_tokens) is completed


def test_prompts_do_not_share_their_blocks():
    one, other = Prompt("a"), Prompt("b")
    one.compact_blocks.append("a block")
    assert other.compact_blocks == []
