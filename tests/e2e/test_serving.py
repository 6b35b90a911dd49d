"""`vllm serve --attention-backend heterocache` over HTTP, with its metrics."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import request_options
from api_server import metric, serve, stock_metric
from engines import DTYPE, GREEDY_TOKENS, MAX_MODEL_LEN, assert_same_greedy_tokens
from request_options import BEAM_TOKENS, NUM_BEAMS, TOOL, TOOL_CHOICE, TOOL_TOKENS

PAUSE_S = 1.5  # many decode steps


@pytest.fixture(scope="module")
def server(model, stock, tmp_path_factory):
    """URL of a server at gpu_budget=1; every long prompt goes through compaction."""
    options = "--additional-config.heterocache"
    with serve(
        model,
        tmp_path_factory.mktemp("server") / "log",
        *(f"{options}.gpu_budget", "1.0", f"{options}.min_prompt_tokens", "64"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "512"),
        *("--dtype", DTYPE),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--structured-outputs-config", json.dumps(request_options.WITHOUT_BLANKS)),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_SERVER_DEV_MODE="1",  # for /pause and /resume
    ) as url:
        yield url


@pytest.fixture
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none", timeout=600)


@pytest.mark.feature("OpenAI server, completions")
def test_concurrent_completions_equal_stock(server, client, stock, mixed_prompts):
    def complete(prompt: list[int]) -> list[int]:
        reply = client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=GREEDY_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return reply.choices[0].model_extra["token_ids"]

    with ThreadPoolExecutor(len(mixed_prompts)) as pool:
        answers = list(pool.map(complete, mixed_prompts))
    for tokens, expected in zip(answers, stock.greedy, strict=True):
        assert_same_greedy_tokens(tokens, expected)

    assert metric(server, "requests_compacted_total") == len(mixed_prompts) - 1
    rows = GREEDY_TOKENS - 1  # the first token comes from the prefill
    assert metric(server, 'decode_rows_total{[^}]*kind="compact"') == rows * (
        len(mixed_prompts) - 1
    )
    assert metric(server, 'decode_rows_total{[^}]*reason="short_prompt"') == rows


@pytest.mark.feature("Prometheus metrics")
def test_all_metrics_are_exported_and_idle_at_zero(server):
    for kind in ("dense", "compact", "host", "spare"):
        assert metric(server, f'pages{{[^}}]*kind="{kind}"') == 0
    for name in ("drift_checks", "drift_triggers", "pages_fetched", "pages_offloaded"):
        assert metric(server, f"{name}_total") == 0  # nothing is compressed at 1.0


@pytest.fixture
def compact_rows(server):
    """`compact_rows()`: decode rows of compacted requests since the test began."""
    pattern = 'decode_rows_total{[^}]*kind="compact"'
    before = metric(server, pattern, before_first=0)
    return lambda: metric(server, pattern, before_first=0) - before


@pytest.mark.feature("OpenAI server, chat")
def test_a_conversation_is_answered_as_by_stock(client, stock, tokenizer, haystack, compact_rows):
    reply = client.chat.completions.create(
        model="model",
        messages=request_options.chat(haystack),
        max_tokens=GREEDY_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    prompt = request_options.chat_prompt(tokenizer, haystack)
    assert reply.model_extra["prompt_token_ids"] == prompt
    assert_same_greedy_tokens(reply.choices[0].model_extra["token_ids"], stock.chat)
    assert reply.choices[0].message.content
    assert compact_rows() == GREEDY_TOKENS - 1


@pytest.mark.feature("Beam search")
def test_beams_are_those_of_stock(server, client, stock, text_tokens, compact_rows):
    """Each token of a beam is a request of its own, which ends before its prompt is compacted."""
    compacted = metric(server, "requests_compacted_total")
    reply = client.completions.create(
        model="model",
        prompt=request_options.beam_prompt(text_tokens),
        n=NUM_BEAMS,
        max_tokens=BEAM_TOKENS,
        temperature=0,
        extra_body={"use_beam_search": True, "return_token_ids": True, "ignore_eos": True},
    )
    beams = [choice.model_extra["token_ids"] for choice in reply.choices]
    assert beams == [beam.tokens[-BEAM_TOKENS:] for beam in stock.beams]
    assert metric(server, "requests_compacted_total") == compacted
    assert compact_rows() == 0


@pytest.mark.feature("Tool calls")
def test_a_tool_is_called_as_by_stock(client, stock, haystack, compact_rows):
    reply = client.chat.completions.create(
        model="model",
        messages=request_options.chat(haystack),
        max_tokens=TOOL_TOKENS,
        temperature=0,
        tools=[TOOL],
        tool_choice=TOOL_CHOICE,
        extra_body={"return_token_ids": True},
    )
    tokens = reply.choices[0].model_extra["token_ids"]
    assert_same_greedy_tokens(tokens, stock.tool_call)
    (call,) = (call.function for call in reply.choices[0].message.tool_calls)
    assert call.name == TOOL["function"]["name"]
    request_options.assert_follows_schema(json.loads(call.arguments))
    assert compact_rows() == len(tokens) - 1 > 0


@pytest.mark.feature("Pause and resume")
@pytest.mark.parametrize("is_cleared", [False, True], ids=["kept", "cleared"])
def test_a_paused_answer_goes_on_as_if_nothing_happened(
    server, client, stock, mixed_prompts, compact_rows, is_cleared
):
    """The pages of a compacted request survive the pause. Where the pause clears the cache, the
    request is preempted, and its prompt and its answer so far are compacted anew."""

    def post(path: str) -> None:
        request = urllib.request.Request(f"{server}/{path}", method="POST")
        urllib.request.urlopen(request, timeout=60).close()

    def stream() -> None:
        chunks = client.completions.create(
            model="model",
            prompt=mixed_prompts[4],
            max_tokens=GREEDY_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        for chunk in chunks:
            for token in chunk.choices[0].model_extra["token_ids"] or ():
                tokens.put(token)

    def next_token(timeout_s: float = 120.0) -> int:
        return tokens.get(timeout=timeout_s)

    compacted = metric(server, "requests_compacted_total")
    preempted = stock_metric(server, "num_preemptions_total")
    tokens: queue.Queue[int] = queue.Queue()
    thread = threading.Thread(target=stream)
    thread.start()
    answer = [next_token() for _ in range(4)]
    post(f"pause?mode=keep&clear_cache={str(is_cleared).lower()}")
    while True:  # what was under way
        try:
            answer.append(next_token(PAUSE_S))
        except queue.Empty:
            break
    assert len(answer) < GREEDY_TOKENS, "the pause came after the answer"
    assert tokens.empty() and thread.is_alive()
    post("resume")
    thread.join(120)
    answer.extend(tokens.queue)
    assert_same_greedy_tokens(answer, stock.greedy[4])
    assert metric(server, "requests_compacted_total") - compacted == 1 + is_cleared
    assert stock_metric(server, "num_preemptions_total") - preempted == is_cleared
    # a prefill gives the first token, and the next one after a preemption
    assert compact_rows() == GREEDY_TOKENS - 1 - is_cleared


def test_bad_option_stops_the_server_with_one_sentence(tiny_model):
    """The sentence reaches the user as it is, not wrapped by pydantic."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_model]
    command += ["--attention-backend", "heterocache", "--skip-tokenizer-init"]
    command += ["--additional-config", '{"heterocache": {"gpu_budgett": 0.3}}']
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "gpu_budgett" in last and "did you mean 'gpu_budget'" in last
