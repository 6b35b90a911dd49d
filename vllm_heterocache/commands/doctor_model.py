"""`heterocache doctor MODEL`: options, profile and pools of one model against this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_heterocache import compat
from vllm_heterocache.calibration.model_identity import check_folder, loading_facts, model_identity
from vllm_heterocache.calibration.profile_cache import find_cached
from vllm_heterocache.commands.finding import GIB, Finding
from vllm_heterocache.compat.backend_name import BACKEND_NAME, is_selected
from vllm_heterocache.compat.drafters import drafter_heads, drafts_with_layers
from vllm_heterocache.compat.layer_kinds import served_layers
from vllm_heterocache.compat.other_groups import OtherGroup, align_block_size, expected_groups
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks, whole_blocks
from vllm_heterocache.heads.profile import HeadProfile, ModelIdentity
from vllm_heterocache.kv_cache_dtype import kv_cache_dtype
from vllm_heterocache.kv_cache_spec import drafter_block_size
from vllm_heterocache.refusal import Refusal, in_one_line
from vllm_heterocache.startup.capacity import (
    nothing_compacted,
    page_bytes,
    steady_state_requests,
)
from vllm_heterocache.startup.host_memory import available_host_bytes
from vllm_heterocache.startup.refusals.check import unsupported
from vllm_heterocache.startup.resolve import make_plan, read_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.policies.policy import Policy


def check_model(command_line: Sequence[str]) -> Iterator[Finding]:
    """Findings about serving with what follows `vllm serve` on this command line."""
    try:
        vllm_config = load_vllm_config(command_line)
    except (ValueError, OSError) as error:
        yield _refused("model", error, "correct MODEL or its options")
        return
    problems = list(unsupported(vllm_config))
    for problem in problems:
        yield Finding("model", *problem, is_error=True)
    if problems:
        return
    yield Finding("model", f"{vllm_config.model_config.architecture} can be served")
    try:
        config, policy = read_options(vllm_config)
    except ValueError as error:
        yield _refused("options", error, "change what it names")
        return
    yield _check_length(vllm_config, config)
    yield from _check_gpu_pool(vllm_config, config, policy.frees_prompt)
    yield from _check_profile(vllm_config, config, policy)


def _refused(subject: str, error: Exception, fix: str) -> Finding:
    """The finding of an error; `fix` is for errors that do not say their own apart."""
    if isinstance(error, Refusal):
        return Finding(subject, *error.sentence, is_error=True)
    return Finding(subject, in_one_line(error), fix, is_error=True)


def load_vllm_config(command_line: Sequence[str]) -> Any:
    """vLLM's own config for `vllm serve COMMAND_LINE`, with the backend left at its default.

    With our backend named, vLLM would call the plugin, which may calibrate. Raises ValueError or
    OSError for what vLLM refuses.
    """
    from vllm_heterocache.compat import AttentionConfig, EngineArgs

    args = _parse(command_line)
    check_folder(args.model)
    engine_args = EngineArgs.from_cli_args(args)
    if str(engine_args.attention_backend).upper() == BACKEND_NAME:
        engine_args.attention_backend = None
    if is_selected(engine_args):
        engine_args.attention_config = AttentionConfig()
    return engine_args.create_engine_config()


def _parse(command_line: Sequence[str]) -> Any:
    """The options as `vllm serve` reads them; ValueError in one sentence where it would not."""
    from vllm_heterocache.compat import FlexibleArgumentParser, ServeSubcommand

    def refuse(message: str) -> NoReturn:
        # Some messages end with the address of the function that could not read a value.
        raise ValueError(re.sub(r"cannot be converted to <.*", "cannot be read as JSON", message))

    parser: Any = FlexibleArgumentParser(prog="vllm")
    serve: Any = ServeSubcommand().subparser_init(parser.add_subparsers())
    parser.error = serve.error = refuse
    words = list(command_line)
    if words[:2] == ["vllm", "serve"]:
        words = words[2:]
    args = parser.parse_args(["serve", *words])
    if args.model_tag is None:
        raise Refusal(f"the options {' '.join(words)} need a MODEL", "name it first")
    args.model = args.model_tag
    sections = args.additional_config
    if not isinstance(sections, (dict, type(None))):  # vLLM parses what looks like an object
        raise Refusal(
            f"--additional-config {sections!r:.80} is no JSON object",
            "write '{\"heterocache\": {...}}', with all its braces",
        )
    return args


def _check_length(vllm_config: Any, config: HeteroCacheConfig) -> Finding:
    options = f"gpu_budget={config.gpu_budget:g}, recipe={config.recipe}"
    longest = vllm_config.model_config.max_model_len
    if config.keeps_everything or longest >= config.min_prompt_tokens:
        return Finding("options", options)
    return Finding(
        "options",
        f"{options}; no prompt is ever compacted, as min_prompt_tokens={config.min_prompt_tokens} "
        f"is above --max-model-len {longest}",
        "lower min_prompt_tokens or raise --max-model-len",
        is_error=True,
    )


def _check_profile(
    vllm_config: Any, config: HeteroCacheConfig, policy: Policy
) -> Iterator[Finding]:
    if not policy.needs_profile:
        yield Finding("profile", "gpu_budget=1 keeps every page, or the policy needs none")
        return
    try:
        profile, finding = _find_profile(vllm_config, config.profile)
    except Refusal as refusal:
        yield Finding("profile", *refusal.sentence, is_error=True)
        return
    yield finding
    if profile is not None:
        yield from _check_budgets(vllm_config, config, policy, profile)


def _find_profile(vllm_config: Any, option: str) -> tuple[HeadProfile | None, Finding]:
    """The profile that start-up would take, None where it would calibrate.

    Raises Refusal where start-up does.
    """
    model = vllm_config.model_config
    identity = model_identity(model)
    if option != "auto":
        return _read_profile(option, identity)
    file = find_cached(identity, loading_facts(model, kv_cache_dtype(vllm_config)))
    problem = "none is cached"
    if file is not None:
        try:
            return _read_profile(file, identity)
        except Refusal as refusal:  # its fix is for those who name a file
            problem = f"the cached {refusal.sentence.problem}"
    return None, Finding(
        "profile",
        f"{problem}; the first start calibrates for a few minutes",
        f"run `heterocache calibrate {model.model}`, with the options of the server that it takes, "
        "to do it now",
    )


def _read_profile(file: str | Path, identity: ModelIdentity) -> tuple[HeadProfile, Finding]:
    profile = HeadProfile.load_for(file, identity)
    return profile, Finding("profile", f"{file}, of {profile.model.name}, fits this model")


def _check_budgets(
    vllm_config: Any, config: HeteroCacheConfig, policy: Policy, profile: HeadProfile
) -> Iterator[Finding]:
    """Roles, budgets and host pool as start-up works them out."""
    max_model_len = vllm_config.model_config.max_model_len
    try:
        plan = make_plan(vllm_config, config, policy, profile)
    except ValueError as error:
        yield _refused("budget", error, "change the options it names")
        return
    block_size = align_block_size(vllm_config)
    if warning := nothing_compacted(max_model_len, plan, block_size):
        yield Finding("budget", *warning, is_error=True)
        return
    smallest = plan.shortest_compacted(block_size)
    kept = whole_blocks(compact_blocks(max_model_len, config.gpu_budget), block_size)
    yield Finding(
        "budget",
        f"prompts from {smallest:,} tokens are compacted; one of {max_model_len:,} keeps {kept:,} "
        f"of {max_model_len // block_size:,} blocks",
    )
    most_led = max(assignment.num_led for assignment in plan.assignments)
    layers_and_heads = max(assignment.num_heads for assignment in plan.assignments)
    offloaded = most_led * (max_model_len // PAGE_SIZE)
    offloaded *= kernel_block_bytes(vllm_config) // layers_and_heads
    yield Finding(
        "host pool",
        f"a request of {max_model_len:,} tokens offloads {offloaded / GIB:.2f} GiB per worker; "
        f"{available_host_bytes() / GIB:.2f} GiB of host memory are free",
    )


def kernel_block_bytes(vllm_config: Any) -> int:
    """Bytes of a kernel block on one rank: a page of K and V for every served layer and KV head."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = -(-len(served_layers(model)) // parallel.pipeline_parallel_size)
    heads = layers * model.get_num_kv_heads(parallel)
    return heads * page_bytes(vllm_config, model.get_head_size())


def drafter_block(vllm_config: Any, block_size: int) -> int | None:
    """Tokens of a block of a drafter's own layers, as start-up works it out; None without them.

    Args:
        block_size: tokens of a block of the model.

    Raises ValueError for a drafter with more KV a token than the model.
    """
    if not drafts_with_layers(vllm_config):
        return None
    num_layers, num_kv_heads, head_size = drafter_heads(vllm_config)
    num_pages = block_size // PAGE_SIZE
    drafter_bytes = num_pages * num_layers * num_kv_heads * page_bytes(vllm_config, head_size)
    block_bytes = num_pages * kernel_block_bytes(vllm_config)
    return drafter_block_size(block_bytes, drafter_bytes, block_size)


def _check_gpu_pool(
    vllm_config: Any, config: HeteroCacheConfig, frees_prompt: bool
) -> Iterator[Finding]:
    max_model_len = vllm_config.model_config.max_model_len
    size, source, asked = _pool_bytes(vllm_config)
    free = available_host_bytes()
    if compat.current_platform.is_cpu() and asked > free:
        yield Finding(
            "KV pool",
            f"vLLM asks for {asked / GIB:.2f} GiB of host memory per worker ({source}), and "
            f"{free / GIB:.2f} GiB are free",
            "set VLLM_CPU_KVCACHE_SPACE to fewer GiB, or free memory",
            is_error=True,
        )
        return
    block_size = align_block_size(vllm_config)
    try:
        drafted = drafter_block(vllm_config, block_size)
    except Refusal as refusal:
        yield Finding("KV pool", *refusal.sentence, is_error=True)
        return
    others = expected_groups(vllm_config) + ([OtherGroup(drafted)] if drafted else [])
    block_bytes = kernel_block_bytes(vllm_config) * block_size // PAGE_SIZE
    num_blocks = max(0, size) // block_bytes
    ours, stock = steady_state_requests(
        num_blocks, max_model_len, config.gpu_budget, block_size, frees_prompt, others
    )
    detail = (
        f"{size / GIB:.2f} GiB per worker ({source}) = {num_blocks:,} blocks, about {ours} "
        f"compacted requests of {max_model_len:,} tokens (stock vLLM: {stock})"
    )
    if block_size > PAGE_SIZE:
        detail += f", with a block for each {block_size} tokens, as recurrent layers need them"
    if drafted is not None:
        detail += f", the drafter's layers with a block for each {drafted} tokens"
    if ours >= 1:
        yield Finding("KV pool", detail)
        return
    memory = (
        "VLLM_CPU_KVCACHE_SPACE" if compat.current_platform.is_cpu() else "--gpu-memory-utilization"
    )
    share = 0.0 if drafted is None else block_size / drafted
    fits = int(num_blocks / (1 + config.gpu_budget + share)) * block_size
    yield Finding(
        "KV pool",
        f"{detail}: a prompt and its compact copy must fit together",
        f"raise {memory} or lower --max-model-len to about {fits}",
        is_error=True,
    )


def _pool_bytes(vllm_config: Any) -> tuple[int, str, int]:
    """Bytes of a worker's KV pool, where they come from, and bytes that vLLM wants to find free."""
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes, "set by option", cache.kv_cache_memory_bytes
    total = compat.current_platform.get_device_total_memory()
    asked = int(total * cache.gpu_memory_utilization)
    world = vllm_config.parallel_config.world_size
    source = f"estimated, {cache.gpu_memory_utilization:.0%} of {total / GIB:.1f} GiB"
    models = {vllm_config.model_config.model}
    if drafts_with_layers(vllm_config):  # MTP layers come with the model
        models.add(vllm_config.speculative_config.draft_model_config.model)
    return asked - sum(map(weight_bytes, models)) // world, source, asked


def weight_bytes(model: str) -> int:
    """Size of a local model's weight files; 0 where they are not on this disk."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
