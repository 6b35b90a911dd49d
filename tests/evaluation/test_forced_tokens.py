"""ForcedTokens in vLLM's logits-processor machinery."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_heterocache.evaluation import forced_tokens
from vllm_heterocache.evaluation.forced_tokens import FREE, ForcedTokens

VOCAB = 11


def params(forced=None, **extra):
    from vllm import SamplingParams

    arguments = dict(extra) if forced is None else {"forced_tokens": forced, **extra}
    return SamplingParams(extra_args=arguments or None)


def force(forced, output_ids, logits):
    return ForcedTokens.new_req_logits_processor(None, params(forced))(output_ids, logits)


def batch_update(size, added=(), removed=(), moved=()):
    from vllm.v1.sample.logits_processor import BatchUpdate

    return BatchUpdate(batch_size=size, added=list(added), removed=list(removed), moved=list(moved))


@pytest.fixture
def processor():
    return ForcedTokens(None, torch.device("cpu"), False)


def test_each_output_position_gets_its_token():
    forced = [3, 0, 10]
    for position, token in enumerate(forced):
        logits = torch.randn(VOCAB)
        assert force(forced, [7] * position, logits).argmax() == token


def test_every_other_token_is_impossible_and_the_forced_one_keeps_its_logit():
    logits = torch.randn(VOCAB)
    value = logits[4].item()
    result = force([4], [], logits)
    assert result[4] == value
    assert result.isneginf().sum() == VOCAB - 1


def test_free_positions_and_those_behind_the_end_are_the_models_own():
    for output_ids in ([], [1, 2], [1, 2, 3, 4]):
        logits = torch.randn(VOCAB)
        before = logits.clone()
        assert torch.equal(force([FREE, 5, FREE], output_ids, logits), before)


def test_request_without_forced_tokens_is_not_processed():
    assert ForcedTokens.new_req_logits_processor(None, params()) is None
    assert ForcedTokens.new_req_logits_processor(None, params(other=1)) is None


def test_greedy_sampling_is_affected():
    """vLLM skips argmax-invariant processors for greedy requests."""
    assert not ForcedTokens.is_argmax_invariant(None)


def test_rows_of_a_batch_are_forced_apart_and_follow_their_request(processor):
    outputs = {"a": [], "b": [], "c": []}
    added = [
        (0, params([1, FREE, 3]), [0], outputs["a"]),
        (1, params(), [0], outputs["b"]),
        (2, params([5, 6]), [0], outputs["c"]),
    ]
    processor.update_state(batch_update(3, added=added))
    logits = torch.zeros(3, VOCAB)
    logits[:, 9] = 1.0  # what the model would choose
    assert processor.apply(logits.clone()).argmax(-1).tolist() == [1, 9, 5]
    for ids in outputs.values():
        ids.append(2)
    assert processor.apply(logits.clone()).argmax(-1).tolist() == [9, 9, 6]

    from vllm.v1.sample.logits_processor import MoveDirectionality

    # request b has ended and c takes its row
    move = (2, 1, MoveDirectionality.UNIDIRECTIONAL)
    processor.update_state(batch_update(2, removed=[1], moved=[move]))
    outputs["a"].append(2)
    assert processor.apply(logits[:2].clone()).argmax(-1).tolist() == [3, 6]


@pytest.mark.parametrize("forced", [[1, -2], ["1"], [1.0], [None], [[1]]], ids=repr)
def test_malformed_lists_are_refused_in_words(forced):
    with pytest.raises(ValueError, match=r"forced_tokens.*list of token ids"):
        ForcedTokens.validate_params(params(forced))


@pytest.mark.parametrize("forced", [5, "12", {"a": 1}, True], ids=repr)
def test_what_is_no_list_is_refused_in_words(forced):
    with pytest.raises(ValueError, match=r"forced_tokens.*list of token ids"):
        ForcedTokens.validate_params(params(forced))


@pytest.mark.parametrize("forced", [None, [], [0, FREE, 10]], ids=repr)
def test_lists_of_token_ids_pass(forced):
    ForcedTokens.validate_params(params(forced))
    ForcedTokens.validate_params(SimpleNamespace(extra_args=None))


def test_vllm_loads_it_by_its_documented_name():
    from vllm.v1.sample.logits_processor import _load_custom_logitsprocs

    name = "vllm_heterocache.evaluation.forced_tokens:ForcedTokens"
    assert name in forced_tokens.__doc__
    assert _load_custom_logitsprocs([name]) == [ForcedTokens]


def test_token_beyond_the_vocabulary_is_reported_and_not_forced(monkeypatch):
    said = []
    monkeypatch.setattr(forced_tokens.logger, "error", lambda text, *args: said.append(text % args))
    logits = torch.randn(VOCAB)
    assert torch.equal(force([VOCAB], [], logits.clone()), logits)
    assert said == [f"forced token {VOCAB} is not in the vocabulary; it is not forced"]


def test_vllm_still_loads_it_by_its_former_name_and_says_so():
    from vllm.v1.sample.logits_processor import _load_custom_logitsprocs

    with pytest.warns(DeprecationWarning, match=r"vllm_heterocache\.evaluation\.forced_tokens:"):
        found = _load_custom_logitsprocs(["vllm_heterocache.forced_tokens:ForcedTokens"])
    assert found == [ForcedTokens]
    with pytest.raises(AttributeError, match="FORCED"):
        _ = importlib.import_module("vllm_heterocache.forced_tokens").FORCED


# --- V2: the batch's logits at once ---


class Batch:
    """The request state and the batch layout of vLLM's V2 runner."""

    def __init__(self, prompt_lens):
        self.requests = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array(prompt_lens)))
        self.processor = ForcedTokens(None, self.requests)

    def apply(self, slots, seq_lens, logits):
        """Lengths are padded to the rows of a CUDA graph."""
        padded = np.array([*seq_lens, 1])
        ctx = SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=padded)
        return self.processor.apply(logits, ctx)


def test_v2_takes_the_same_class_and_no_other_hook_is_missing():
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    assert issubclass(ForcedTokens, LogitsProcessor)
    assert {"add_request", "apply", "validate_params"} <= vars(ForcedTokens).keys()


def test_v2_rows_get_the_tokens_of_their_output_positions():
    batch = Batch([5, 7, 3, 4])
    assert batch.processor.add_request(2, params([8, FREE, 1]))
    assert batch.processor.add_request(0, params([2]))
    assert not batch.processor.add_request(1, params())
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    # rows in another order than slots; slot 3 was never added
    out = batch.apply([1, 2, 0, 3], [9, 5, 5, 4], logits)
    assert out[2].argmax() == 2 and out[2, 2] == before[2, 2] and out[2].isinf().sum() == VOCAB - 1
    assert out[1].argmax() == 1 and out[1].isinf().sum() == VOCAB - 1, "third output of slot 2"
    assert torch.equal(out[[0, 3]], before[[0, 3]])
    assert torch.equal(batch.apply([2], [4], before[:1].clone()), before[:1]), "a free position"
    assert torch.equal(batch.apply([2], [6], before[:1].clone()), before[:1]), "past the end"
    assert torch.equal(batch.apply([2], [1], before[:1].clone()), before[:1]), "within the prompt"


def test_v2_slot_of_a_request_that_left_forces_nothing():
    batch = Batch([5])
    batch.processor.add_request(0, params([2, 3]))
    batch.processor.add_request(0, params())
    logits = torch.randn(1, VOCAB)
    assert torch.equal(batch.apply([0], [5], logits.clone()), logits)


def test_v2_token_outside_the_vocabulary_is_not_forced(monkeypatch):
    said = []
    monkeypatch.setattr(forced_tokens.logger, "error", lambda text, *a: said.append(text % a))
    batch = Batch([5])
    batch.processor.add_request(0, params([VOCAB]))
    logits = torch.randn(1, VOCAB)
    assert torch.equal(batch.apply([0], [5], logits.clone()), logits)
    assert len(said) == 1
