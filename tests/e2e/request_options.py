"""Requests with options that stock vLLM answers first: what vLLM itself does to their tokens.

Prompts are of odd lengths, and answers end where `max_tokens` or a grammar says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

CITIES = ["Lisbon", "Oslo", "Quito"]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": CITIES},
        "is_large": {"type": "boolean"},
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
    },
    "required": ["city", "is_large", "name"],
    "additionalProperties": False,
}
NO_PENALTY = "no penalty"
PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
}
NUM_BEAMS, BEAM_TOKENS = 3, 6
# The small model would fill its answers with blanks, which JSON allows anywhere.
WITHOUT_BLANKS = {"backend": "xgrammar", "disable_any_whitespace": True}
TOOL = {
    "type": "function",
    "function": {
        "name": "describe_city",
        "description": "Describe a city.",
        "parameters": SCHEMA,
        "strict": True,  # else vLLM takes any JSON for arguments
    },
}
TOOL_CHOICE = {"type": "function", "function": {"name": "describe_city"}}
TOOL_TOKENS = 80  # more than one call needs
QUESTION = "\n\nSay in a few words what this text is about."


def requests(text_tokens: Callable[[int, int], list[int]]) -> dict[str, tuple[list[int], Any]]:
    """Name -> prompt, and vLLM's SamplingParams with the two best log-probabilities."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(**options: Any) -> Any:
        return SamplingParams(temperature=0.0, max_tokens=48, logprobs=2, **options)

    def grammar(**options: Any) -> Any:
        return params(structured_outputs=StructuredOutputsParams(**options))

    penalized = text_tokens(7000, 417)
    return {
        "prompt_logprobs": (text_tokens(1000, 643), params(prompt_logprobs=1)),
        NO_PENALTY: (penalized, params(ignore_eos=True)),
        **{
            name: (penalized, params(ignore_eos=True, **{name: penalty}))
            for name, penalty in PENALTIES.items()
        },
        "json": (text_tokens(9000, 333), grammar(json=SCHEMA)),
        "choice": (text_tokens(11000, 250), grammar(choice=CITIES)),
    }


def answer(engine: Any, asked: dict[str, tuple[list[int], Any]]) -> dict[str, Any]:
    """Name -> vLLM's output of the request; all run at once."""
    prompts, params = zip(*asked.values(), strict=True)
    outputs = engine.run(list(prompts), list(params))
    return {name: outputs[str(i)] for i, name in enumerate(asked)}


def assert_follows_schema(value: Any) -> None:
    """Of what a grammar for SCHEMA lets through."""
    assert value.keys() == {"city", "is_large", "name"}
    assert value["city"] in CITIES and value["is_large"] in (True, False)
    assert 3 <= len(value["name"]) <= 12


def beams(engine: Any, prompt: Sequence[int]) -> list[Any]:
    """vLLM's beams for a prompt, best first."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=NUM_BEAMS, max_tokens=BEAM_TOKENS, ignore_eos=True)
    return engine.llm.beam_search([{"prompt_token_ids": list(prompt)}], params)[0].sequences


def beam_prompt(text_tokens: Callable[[int, int], list[int]]) -> list[int]:
    return text_tokens(13000, 301)


def chat(haystack: str) -> list[dict[str, str]]:
    """Messages of a conversation with a long text."""
    return [
        {"role": "system", "content": "You answer questions about a text."},
        {"role": "user", "content": haystack[5000:8000] + QUESTION},
    ]


def chat_prompt(tokenizer: Any, haystack: str) -> list[int]:
    """What the model's chat template makes of `chat`."""
    text = tokenizer.apply_chat_template(chat(haystack), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def tool_call() -> Any:
    """vLLM's SamplingParams for a call of TOOL, as a server makes them for the parser `hermes`."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionNamedToolChoiceParam,
        ChatCompletionToolsParam,
    )
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag

    tag = get_model_structural_tag(
        "hermes",
        [ChatCompletionToolsParam(**TOOL)],
        ChatCompletionNamedToolChoiceParam(**TOOL_CHOICE),
        reasoning=False,
    )
    grammar = StructuredOutputsParams(structural_tag=tag.model_dump_json())
    return SamplingParams(
        temperature=0.0, max_tokens=TOOL_TOKENS, logprobs=2, structured_outputs=grammar
    )
