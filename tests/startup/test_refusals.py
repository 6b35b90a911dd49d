"""Every vLLM configuration that is refused, each with its message.

Options of the engine are tried on vLLM's own config objects; properties of models, which would
need a vLLM model inspection of half a minute each, on fakes with the same attributes.
"""

from types import SimpleNamespace

import pytest

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.connectors.hetero import HeteroConnector
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS, element_bytes, kv_cache_dtype
from vllm_heterocache.plugin import OptionError
from vllm_heterocache.policies.fier import FIER
from vllm_heterocache.policies.full import Full
from vllm_heterocache.policies.h2o import H2O
from vllm_heterocache.policies.heterocache import HeteroCache
from vllm_heterocache.policies.oracle import Oracle
from vllm_heterocache.policies.quest import Quest
from vllm_heterocache.policies.rocketkv import RocketKV
from vllm_heterocache.policies.snapkv import SnapKV
from vllm_heterocache.startup.refusals.check import check_vllm_config, unsupported
from vllm_heterocache.startup.refusals.connectors import check_connectors
from vllm_heterocache.startup.refusals.host_memory import check_host_pool
from vllm_heterocache.startup.refusals.kv_cache_dtypes import check_fp8_prefill
from vllm_heterocache.startup.refusals.platforms import check_kernels, check_length, check_policy

GIB = 1 << 30


def refused(*names: str) -> pytest.MarkDecorator:
    """Marks a test of the sentence that refuses these features."""
    return pytest.mark.feature(*names, refused=True)


def engine_config(model: str, **options):
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=model, skip_tokenizer_init=True, load_format="dummy", **options)
    return args.create_engine_config()


def assert_one_sentence(message: str) -> None:
    assert message.startswith("--attention-backend heterocache does not support ")
    assert message.endswith(".") and "\n" not in message
    assert ": " in message and "; " in message, "reason and fix"


def test_plain_config_passes(tiny_model):
    check_vllm_config(engine_config(tiny_model))
    check_vllm_config(engine_config(tiny_model, block_size=16, kv_cache_dtype="bfloat16"))
    check_vllm_config(engine_config(tiny_model, dtype="float16", kv_cache_dtype="float16"))
    check_vllm_config(engine_config(tiny_model, dtype="float32"))


@pytest.mark.parametrize("num_drafts", [1, 7])
def test_ngram_drafts_pass(tiny_model, num_drafts):
    drafts = {
        "method": "ngram",
        "num_speculative_tokens": num_drafts,
        "prompt_lookup_max": 2,
    }
    check_vllm_config(engine_config(tiny_model, speculative_config=drafts))


def draft(config, method: str = "eagle3", **changes):
    """The config with drafts of this method, as far as the checks look at them."""
    plain = {"num_speculative_tokens": 3, "attention_backend": None, "kv_cache_dtype": None}
    config.speculative_config = SimpleNamespace(method=method, **{**plain, **changes})
    return config


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_drafters_with_layers_pass(tiny_model, method):
    check_vllm_config(draft(engine_config(tiny_model), method))
    flash = SimpleNamespace(name="FLASH_ATTN")
    check_vllm_config(draft(engine_config(tiny_model), method, attention_backend=flash))
    config = engine_config(tiny_model, kv_cache_dtype="fp8")
    check_vllm_config(draft(config, method, kv_cache_dtype="fp8"))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("suffix", marks=refused("Suffix decoding")),
        pytest.param("dflash", marks=refused("Other drafters")),
        pytest.param("medusa", marks=refused("Other drafters")),
    ],
)
def test_other_drafters_are_refused(tiny_model, method):
    said = rf"\(method '{method}'\): .*use one of the methods ngram, .*mtp or remove --spec"
    with pytest.raises(ValueError, match=said):
        check_vllm_config(draft(engine_config(tiny_model), method))


@pytest.mark.feature("Drafters under conditions", refused=True)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"attention_backend": SimpleNamespace(name="HETEROCACHE")},
            r"\(attention_backend 'HETEROCACHE'\): .*; remove attention_backend from --spec",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            r"\(kv_cache_dtype 'fp8'\): .*; remove kv_cache_dtype from --spec",
        ),
    ],
)
def test_a_drafter_that_does_not_fit_the_pool_is_refused(tiny_model, changes, said):
    with pytest.raises(ValueError, match=said):
        check_vllm_config(draft(engine_config(tiny_model), **changes))


@pytest.mark.feature("Drafters under conditions", refused=True)
def test_a_drafter_in_a_pipeline_or_without_groups_is_refused(tiny_model):
    config = draft(engine_config(tiny_model))
    config.parallel_config.pipeline_parallel_size = 2
    said = r"pipeline_parallel_size=2 with a drafter \(method 'eagle3'\): .*use --tensor-parallel"
    with pytest.raises(ValueError, match=said):
        check_vllm_config(config)
    config = draft(engine_config(tiny_model))
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    said = r"disable_hybrid_kv_cache_manager=True with a drafter .*; remove --disable-hybrid-kv-"
    with pytest.raises(ValueError, match=said):
        check_vllm_config(config)


@pytest.mark.parametrize("dtype", FP8_ELEMENTS)
def test_fp8_kv_cache_passes(tiny_model, dtype):
    check_vllm_config(engine_config(tiny_model, kv_cache_dtype=dtype))
    check_vllm_config(engine_config(tiny_model, kv_cache_dtype=dtype, dtype="float32"))


def test_layers_without_fp8_are_no_hindrance_where_no_layer_has_it(tiny_model):
    check_vllm_config(engine_config(tiny_model, kv_cache_dtype_skip_layers=["0"]))


def test_config_without_a_model_passes():
    from vllm.config import VllmConfig

    check_vllm_config(VllmConfig())


REFUSED_OPTIONS = [
    pytest.param(
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 8,
                "prompt_lookup_max": 2,
            }
        },
        r"\(num_speculative_tokens 8\): .*use num_speculative_tokens of 7 or less\.",
        marks=refused("More than 7 drafts"),
    ),
    pytest.param(
        {"kv_cache_dtype": "int8_per_token_head"},
        r"kv_cache_dtype='int8_per_token_head': .*in fp8 or in the model's own precision, "
        r"dtype='bfloat16'; use --kv-cache-dtype bfloat16\.",
        marks=refused("int8 KV cache"),
    ),
    pytest.param(
        {"kv_cache_dtype": "fp8_per_token_head"},
        "kv_cache_dtype='fp8_per_token_head'",
        marks=refused("fp8 KV cache with scales per token and head"),
    ),
    pytest.param(
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "3"]},
        r"kv_cache_dtype_skip_layers=\['0', '3'\]: .*remove --kv-cache-dtype-skip-layers\.",
        marks=refused("Single layers without fp8"),
    ),
    pytest.param(
        {"block_size": 32},
        "block_size=32: .*16 tokens.*remove --block-size or set it to 16",
        marks=refused("Blocks of other sizes"),
    ),
    ({"block_size": 128}, "block_size=128"),
    pytest.param(
        {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
        "kv_connector='LMCacheConnectorV1': .*; use NixlConnector or OffloadingConnector, or "
        "remove --kv-transfer-config",
        marks=refused("Other KV connectors"),
    ),
    pytest.param(
        {"worker_cls": "my.Worker"},
        "worker_cls='my.Worker': .*remove --worker-cls",
        marks=refused("Another worker class"),
    ),
    pytest.param(
        {"kv_sharing_fast_prefill": True},
        "kv_sharing_fast_prefill=True: .*remove --kv-sharing-fast-prefill",
        marks=refused("Fast prefill of shared KV"),
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS, ids=lambda v: str(v)[:40])
def test_engine_option_is_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message) as error:
        check_vllm_config(engine_config(tiny_model, **options))
    assert_one_sentence(str(error.value))


@refused("KV cache of another 16-bit dtype")
@pytest.mark.parametrize(
    ("dtype", "fix"),
    [("float16", "use --kv-cache-dtype float16"), ("float32", "remove --kv-cache-dtype")],
)
def test_kv_cache_of_another_dtype_than_the_models_is_refused(tiny_model, dtype, fix):
    """The option is set late, because vLLM 0.33 refuses it by itself."""
    config = engine_config(tiny_model, dtype=dtype)
    config.cache_config.cache_dtype = "bfloat16"
    with pytest.raises(ValueError, match=rf"kv_cache_dtype='bfloat16': .*{dtype}.*{fix}") as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


def offloading(**extra) -> dict:
    """vLLM's own connector for KV offloading, by its name."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 30, **extra},
    }


def test_kv_offloading_of_vllm_passes_where_there_are_copies(tiny_model):
    by_size = engine_config(tiny_model, kv_offloading_size=1.0)
    by_name = engine_config(tiny_model, kv_transfer_config=offloading())
    for config in (by_size, by_name):
        check_vllm_config(config)
        check_connectors(config, "cuda")
    own = engine_config(tiny_model, kv_transfer_config=offloading(spec_name="Own"))
    check_connectors(own, "cpu")
    check_connectors(engine_config(tiny_model), "cpu")


@refused("KV offloading under conditions")
@pytest.mark.parametrize("asked", ["size", "name"])
def test_kv_offloading_of_vllm_is_refused_on_the_cpu(tiny_model, asked):
    options = {"kv_offloading_size": 1.0}
    if asked == "name":
        options = {"kv_transfer_config": offloading()}
    with pytest.raises(ValueError, match=r"on the CPU platform: .*; remove --kv-") as error:
        check_connectors(engine_config(tiny_model, **options), "cpu")
    assert_one_sentence(str(error.value))


@refused("KV offloading under conditions")
def test_kv_offloading_that_would_share_other_kv_is_refused(tiny_model):
    config = engine_config(tiny_model, kv_offloading_size=1.0)
    config.cache_config.kv_offloading_backend = "lmcache"
    said = "kv_offloading_backend='lmcache': .*; use --kv-offloading-backend native"
    with pytest.raises(ValueError, match=said):
        check_vllm_config(config)
    generated = offloading(offload_prompt_only=False)
    said = "offload_prompt_only=False in kv_connector_extra_config: .*; remove it"
    with pytest.raises(ValueError, match=said):
        check_vllm_config(engine_config(tiny_model, kv_transfer_config=generated))


@refused("KV offloading under conditions")
def test_kv_offloading_of_a_drafter_is_refused(tiny_model):
    config = draft(engine_config(tiny_model, kv_offloading_size=1.0))
    with pytest.raises(ValueError, match=r"drafter \(method 'eagle3'\): .*; remove --kv-offload"):
        check_vllm_config(config)


def nixl(**options) -> dict:
    return {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", **options}


def several(*connectors: dict) -> dict:
    extra = {"connectors": list(connectors)}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


@pytest.mark.parametrize(
    "asked", [nixl(), several(nixl(), offloading()), several(offloading(), nixl())]
)
def test_prefill_and_decode_apart_passes_alone_and_beside_offloading(tiny_model, asked):
    config = engine_config(tiny_model, kv_transfer_config=asked)
    check_vllm_config(config)
    check_connectors(engine_config(tiny_model, kv_transfer_config=nixl()), "cpu")


@refused("Prefill and decode apart, under conditions")
@pytest.mark.parametrize(
    ("asked", "change", "message"),
    [
        (
            nixl(kv_connector_extra_config={"bidirectional_kv_xfer": True}),
            lambda config: None,
            "bidirectional_kv_xfer=True in kv_connector_extra_config: .*; remove it",
        ),
        (
            nixl(),
            lambda config: draft(config),
            r"NixlConnector with a drafter \(method 'eagle3'\): .*; remove --kv-transfer-config or",
        ),
        (
            nixl(),
            lambda config: setattr(config.parallel_config, "pipeline_parallel_size", 2),
            "pipeline_parallel_size=2 with NixlConnector: .*; use --tensor-parallel-size instead",
        ),
    ],
    ids=["both-ways", "drafter", "pipeline"],
)
def test_prefill_and_decode_apart_is_refused(tiny_model, asked, change, message):
    config = engine_config(tiny_model, kv_transfer_config=asked)
    change(config)
    with pytest.raises(ValueError, match=message) as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


@refused("Prefill and decode apart, under conditions")
@pytest.mark.parametrize(("platform", "device"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_blocks_that_would_be_sent_from_a_copy_are_refused(tiny_model, platform, device):
    config = engine_config(tiny_model, kv_transfer_config=nixl(kv_buffer_device=device))
    words = f"kv_buffer_device='{device}' .* {platform} platform: .*; use kv_buffer_device"
    with pytest.raises(ValueError, match=f"{words} '{platform}'") as error:
        check_connectors(config, platform)
    assert_one_sentence(str(error.value))


@refused("Other KV connectors")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([nixl(kv_connector="NixlPushConnector")], "kv_connector='NixlPushConnector': "),
        ([nixl(), nixl()], r"with the connectors \['NixlConnector', 'Nixl.*; name each .* once"),
    ],
    ids=["another", "twice"],
)
def test_among_several_connectors_it_is_refused(tiny_model, asked, message):
    config = engine_config(tiny_model, kv_transfer_config=several(*asked))
    with pytest.raises(ValueError, match=message) as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
WITH_FP8_KV = {
    "llm-compressor": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {},
        "ignore": ["lm_head"],
        "kv_cache_scheme": FP8_KV,
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_scheme": FP8_KV,
        "ignore": ["lm_head"],
    },
}


@pytest.mark.parametrize("maker", WITH_FP8_KV)
def test_fp8_kv_cache_that_the_checkpoint_declares_is_served(make_model_folder, maker):
    """vLLM turns "auto" into it, with ModelOpt before this check and else in the worker."""
    quantized = make_model_folder(quantization_config=WITH_FP8_KV[maker])
    config = engine_config(quantized)
    check_vllm_config(config)
    assert FP8_ELEMENTS[kv_cache_dtype(config)] == "float8_e4m3fn" and element_bytes(config) == 1
    plain = engine_config(quantized, kv_cache_dtype="bfloat16")
    check_vllm_config(plain)
    assert kv_cache_dtype(plain) == "bfloat16" and element_bytes(plain) == 2


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "size"),
    [("bfloat16", "auto", 2), ("float32", "auto", 4), *(("float32", n, 1) for n in FP8_ELEMENTS)],
)
def test_an_element_of_the_cache_has_so_many_bytes(tiny_model, dtype, cache_dtype, size):
    config = engine_config(tiny_model, dtype=dtype, kv_cache_dtype=cache_dtype)
    assert element_bytes(config) == size


@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16"])
def test_a_cache_in_the_models_dtype_is_prefilled_everywhere(cache_dtype):
    config = fp8_config(cache_dtype)
    for platform in ("cpu", "cuda"):
        check_fp8_prefill(config, platform, lambda *_: False)


def test_fp8_is_prefilled_where_flash_attention_takes_it():
    asked = []
    config = fp8_config("fp8")
    check_fp8_prefill(config, "cuda", lambda *args: asked.append(args) or True)
    assert asked == [("fp8", 96)]
    check_fp8_prefill(config, "cpu", lambda *_: False)


@refused("fp8 KV cache that FlashAttention does not take")
@pytest.mark.parametrize(
    ("cache_dtype", "scheme", "taken", "words"),
    [
        ("fp8", None, (), r"kv_cache_dtype='fp8': .*; use --kv-cache-dtype bfloat16\."),
        (
            "auto",
            {"num_bits": 8},
            (),
            r"kv_cache_dtype='fp8', which the checkpoint declares: .*--kv-cache-dtype bfloat16\.",
        ),
        ("fp8_e5m2", None, ("fp8",), r"'fp8_e5m2': FlashAttention.*; use --kv-cache-dtype fp8\."),
    ],
)
def test_fp8_that_flash_attention_does_not_take_is_refused(cache_dtype, scheme, taken, words):
    config = fp8_config(cache_dtype)
    config.quant_config = SimpleNamespace(kv_cache_scheme=scheme)
    with pytest.raises(ValueError, match=words) as error:
        check_fp8_prefill(config, "cuda", lambda dtype, _: dtype in taken)
    assert_one_sentence(str(error.value))


@refused("fp8 KV cache that FlashAttention does not take")
def test_models_in_fp16_are_not_prefilled_with_fp8():
    """FlashAttention raises in the first forward pass."""
    config = fp8_config("fp8", dtype="torch.float16")
    words = "'fp8' with dtype='float16': .*--dtype bfloat16 or --kv-cache-dtype float16"
    with pytest.raises(ValueError, match=words) as error:
        check_fp8_prefill(config, "cuda", lambda *_: True)
    assert_one_sentence(str(error.value))
    check_fp8_prefill(config, "cpu", lambda *_: True)


def fp8_config(cache_dtype: str, dtype: str = "torch.bfloat16"):
    config = fake_config(get_head_size=lambda: 96, dtype=dtype)
    config.cache_config.cache_dtype = cache_dtype
    return config


@refused("Decode context parallelism")
def test_decode_context_parallelism_is_refused(make_model_folder):
    one_kv_head = make_model_folder(num_key_value_heads=1)
    config = engine_config(one_kv_head, tensor_parallel_size=2, decode_context_parallel_size=2)
    with pytest.raises(
        ValueError, match=r"decode_context_parallel_size=2: .*lie whole on one rank"
    ):
        check_vllm_config(config)


@refused("Prefill context parallelism")
def test_prefill_context_parallelism_is_refused(tiny_model):
    """vLLM's V1 runner refuses it first; its V2 runner takes it."""
    config = engine_config(tiny_model)
    config.parallel_config.prefill_context_parallel_size = 2
    with pytest.raises(ValueError, match=r"prefill_context_parallel_size=2: .*remove") as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


def test_named_backend_applies_the_checks_at_start_up(tiny_model):
    with pytest.raises(OptionError, match="does not support block_size=32"):
        engine_config(tiny_model, attention_backend="heterocache", block_size=32)
    # without the name, the plugin has no opinion
    assert engine_config(tiny_model, block_size=32).cache_config.block_size == 32


def test_rewritten_config_passes_again(tiny_model):
    config = engine_config(
        tiny_model,
        attention_backend="heterocache",
        additional_config={"heterocache": {"gpu_budget": 1.0}},
    )
    assert config.cache_config.block_size == 16
    check_vllm_config(config)


@pytest.mark.slow
def test_real_sliding_window_models(make_model_folder):
    window = {"sliding_window": 512}
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config = engine_config(make_model_folder(**mistral, **window))
    with pytest.raises(ValueError, match="every layer slides over a window of 512 tokens"):
        check_vllm_config(config)
    check_vllm_config(engine_config(make_model_folder(**mistral, sliding_window=None)))
    check_vllm_config(
        engine_config(make_model_folder(**mistral, **window), disable_sliding_window=True)
    )


def fake_config(*, text: dict | None = None, parallel: dict | None = None, **model):
    """A VllmConfig of a plain decoder, with changes."""
    text_config = SimpleNamespace(**(text or {}))
    fields = {
        "model": "org/some-model",
        "dtype": "torch.bfloat16",
        "hf_text_config": text_config,
        "runner_type": "generate",
        "use_mla": False,
        "is_encoder_decoder": False,
        "is_attention_free": False,
        "is_diffusion": False,
        "is_mm_prefix_lm": False,
        "uses_alibi": False,
        "is_hybrid": False,
        "rswa_window": None,
        "enable_sleep_mode": False,
        "get_sliding_window": lambda: getattr(text_config, "sliding_window", None),
        **model,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**fields),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            user_specified_block_size=False,
            block_size=128,
            kv_offloading_size=None,
            kv_offloading_backend="native",
            kv_sharing_fast_prefill=False,
            prefix_match_unit=None,
        ),
        parallel_config=SimpleNamespace(
            **{
                "decode_context_parallel_size": 1,
                "prefill_context_parallel_size": 1,
                "use_ubatching": False,
                "pipeline_parallel_size": 1,
                "world_size": 1,
                "distributed_executor_backend": "uni",
                "worker_cls": "auto",
                **(parallel or {}),
            }
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None, backend_per_kind={}),
        aux_output_config=SimpleNamespace(enabled=False),
        quant_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        diffusion_config=None,
    )


MIXED = refused("Full attention mixed with other kinds of layers")
SHAPES = refused("Keys that are values, values of another size")
WINDOWED = refused("Sliding window in every layer")
MIXES_SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
MIXES_RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
REFUSED_MODELS = [
    pytest.param(
        {"use_mla": True},
        r"multi-head latent attention \(MLA\)",
        marks=refused("Multi-head latent attention (MLA)"),
    ),
    pytest.param(
        {"is_encoder_decoder": True}, "encoder-decoder model", marks=refused("Encoder-decoder")
    ),
    pytest.param(
        {"runner_type": "pooling"},
        "encoder or pooling model",
        marks=refused("Embeddings and pooling"),
    ),
    pytest.param(
        {"is_attention_free": True}, "no attention layers", marks=refused("No attention layers")
    ),
    pytest.param({"uses_alibi": True}, r"a bias by distance \(ALiBi\)", marks=refused("ALiBi")),
    pytest.param({"is_diffusion": True}, "discrete diffusion", marks=refused("Diffusion models")),
    pytest.param(
        {"is_mm_prefix_lm": True},
        "both directions within images",
        marks=refused("Images that are attended to in both directions"),
    ),
    pytest.param(
        {"is_hybrid": True},
        "mixes full attention with recurrent or windowed layers",
        marks=MIXED,
    ),
    pytest.param({"rswa_window": 64}, "mixes full attention with", marks=MIXED),
    pytest.param(
        {"text": {"sliding_window": 777}},
        "window of 777 tokens.*--disable-sliding-window with --max-model-len 777 or less",
        marks=WINDOWED,
    ),
    pytest.param(
        {"text": {"sliding_window": 9, "layer_types": ["sliding_attention"] * 3}},
        "every layer slides over a window of 9 tokens",
        marks=WINDOWED,
    ),
    pytest.param(
        {"text": {"sliding_window": 9, "layer_types": ["chunked_attention", "full_attention"]}},
        "mixes full attention with chunked_attention",
        marks=MIXED,
    ),
    pytest.param(
        {"text": {"head_dim": 192, "v_head_dim": 128}},
        "its keys have 192 elements and its values 128",
        marks=SHAPES,
    ),
    pytest.param(
        {"text": {"head_dim": 256, "global_head_dim": 512}},
        "heads of its layers with full attention have 512 elements and others 256",
        marks=SHAPES,
    ),
    pytest.param(
        {"text": {"attention_k_eq_v": True}},
        r"keys of its layers with full attention are their values \(attention_k_eq_v\)",
        marks=SHAPES,
    ),
    pytest.param(
        {"text": {"layer_types": ["indexed_attention", "linear_attention", "full_attention"]}},
        "mixes full attention with indexed_attention",
        marks=MIXED,
    ),
    pytest.param(
        {"text": {"sliding_window": 9, "layer_types": [*MIXES_SLIDING["layer_types"], "conv"]}},
        "mixes full attention with sliding_attention",
        marks=MIXED,
    ),
    pytest.param(
        {"text": {"attention_chunk_size": 8192}},
        "chunks of 8192 tokens",
        marks=refused("Attention in chunks"),
    ),
    pytest.param(
        {"text": {"num_kv_shared_layers": 10}},
        "10 of its layers share the KV cache",
        marks=refused("KV shared between layers"),
    ),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED_MODELS, ids=lambda v: str(v)[:50])
def test_model_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check_vllm_config(fake_config(**changes))
    assert_one_sentence(str(error.value))
    assert "the model 'org/some-model'" in str(error.value)
    assert "another attention backend" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        # --disable-sliding-window caps the length and makes these layers full ones
        {"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]},
        MIXES_SLIDING,
        MIXES_SLIDING | {"head_dim": 64, "v_head_dim": 64, "attention_k_eq_v": False},
    ],
)
def test_models_with_full_attention_pass(text):
    check_vllm_config(fake_config(text=text))


@pytest.mark.parametrize(
    "text",
    [
        MIXES_RECURRENT,
        {"layer_types": ["conv", "conv", "full_attention"]},
        {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    ],
)
def test_models_with_recurrent_layers_beside_full_attention_pass(text):
    check_vllm_config(fake_config(text=text, is_hybrid=True))
    for method in ("ngram", "mtp"):
        check_vllm_config(draft(fake_config(text=text, is_hybrid=True), method))


def with_one_backend(config, name: str):
    config.attention_config.backend_per_kind = {"sliding_window": SimpleNamespace(name=name)}
    return config


def test_backends_of_vllm_that_take_the_layout_may_be_named_for_sliding_layers():
    for name in ("FLASH_ATTN", "CPU_ATTN"):
        check_vllm_config(with_one_backend(fake_config(text=MIXES_SLIDING), name))
    check_vllm_config(with_one_backend(fake_config(), "FLASHINFER"))


@refused("Sliding windows beside full attention, under conditions")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda config: setattr(config.parallel_config, "pipeline_parallel_size", 2),
            "pipeline_parallel_size=2 with the model .*: ranks would have unlike shares .*; use "
            "--tensor-parallel-size instead",
        ),
        (
            lambda config: setattr(
                config.scheduler_config, "disable_hybrid_kv_cache_manager", True
            ),
            "disable_hybrid_kv_cache_manager=True with .*; remove --disable-hybrid",
        ),
        (
            lambda config: draft(config, "draft_model"),
            r"speculative_config \(method 'draft_model'\) with .*; draft with method 'ngram' or",
        ),
        (
            lambda config: with_one_backend(config, "FLASHINFER"),
            "backend_per_kind={'sliding_window': 'FLASHINFER'}: .*; remove sliding_window from",
        ),
        (
            lambda config: setattr(config.cache_config, "kv_offloading_size", 1.0),
            "KV offloading with the model .*; remove --kv-offloading-size",
        ),
        (
            lambda config: setattr(config, "kv_transfer_config", SimpleNamespace(**nixl())),
            "kv_connector='NixlConnector' with the model .*; remove --kv-transfer-config",
        ),
    ],
    ids=["pipeline", "one-manager", "drafter", "backend", "offloading", "nixl"],
)
def test_beside_sliding_layers_it_is_refused(change, reason):
    config = fake_config(text=MIXES_SLIDING)
    change(config)
    with pytest.raises(ValueError, match=reason) as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


@refused("Recurrent layers beside full attention, under conditions")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda config: setattr(config.parallel_config, "pipeline_parallel_size", 2),
            "pipeline_parallel_size=2 with the model .*recurrent: .*; use --tensor-parallel-size",
        ),
        (
            lambda config: setattr(
                config.scheduler_config, "disable_hybrid_kv_cache_manager", True
            ),
            "disable_hybrid_kv_cache_manager=True with .*; remove --disable-hybrid",
        ),
        (
            lambda config: draft(config, "eagle3"),
            r"speculative_config \(method 'eagle3'\) with .*; draft with method 'mtp' or 'ngram'",
        ),
        (
            lambda config: setattr(config.cache_config, "kv_offloading_size", 1.0),
            "KV offloading with the model .*; remove --kv-offloading-size",
        ),
        (
            lambda config: setattr(config, "kv_transfer_config", SimpleNamespace(**nixl())),
            "kv_connector='NixlConnector' with the model .*; remove --kv-transfer-config",
        ),
        (
            lambda config: setattr(config.cache_config, "prefix_match_unit", 16),
            "prefix_match_unit=16 with the model .*; remove --prefix-match-unit",
        ),
    ],
    ids=["pipeline", "one-manager", "drafter", "offloading", "nixl", "hits-within-blocks"],
)
def test_beside_recurrent_layers_it_is_refused(change, reason):
    config = fake_config(text=MIXES_RECURRENT, is_hybrid=True)
    change(config)
    with pytest.raises(ValueError, match=reason) as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


@refused("Another backend for full attention")
def test_full_attention_by_another_backend_is_refused():
    config = fake_config()
    others = {"full_attention": SimpleNamespace(name="FLASH_ATTN")}
    config.attention_config.backend_per_kind = others
    words = r"backend_per_kind={'full_attention': 'FLASH_ATTN'}: .*remove full_attention from"
    with pytest.raises(ValueError, match=words) as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))
    ours = {"full_attention": SimpleNamespace(name="HETEROCACHE")}
    config.attention_config.backend_per_kind = ours
    check_vllm_config(config)
    others = {"mla_attention": SimpleNamespace(name="FLASHMLA")}
    config.attention_config.backend_per_kind = others
    check_vllm_config(config)


@refused("Another backend for full attention")
def test_full_attention_by_another_backend_is_refused_at_start_up(tiny_model):
    attention = {"backend": "heterocache", "backend_per_kind": {"full_attention": "CPU_ATTN"}}
    with pytest.raises(OptionError, match="backend_per_kind"):
        engine_config(tiny_model, attention_config=attention)


def test_the_backend_named_for_full_attention_alone_is_the_backend(tiny_model):
    """Its layers would answer zeros without the plugin's worker."""
    config = engine_config(
        tiny_model,
        attention_config={"backend_per_kind": {"full_attention": "heterocache"}},
        additional_config={"heterocache": {"gpu_budget": 1.0}},
    )
    assert config.parallel_config.worker_cls.startswith("vllm_heterocache.")


@refused("HiSparse")
def test_sparse_offloading_of_vllm_is_refused():
    config = fake_config()
    config.attention_config.hisparse_config = object()
    with pytest.raises(ValueError, match=r"attention_config\.hisparse_config: .*remove") as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


@refused("Routed experts in answers")
def test_auxiliary_outputs_are_refused():
    config = fake_config()
    config.aux_output_config.enabled = True
    words = "aux_output_config .*remove --enable-return-routed-experts"
    with pytest.raises(ValueError, match=words) as error:
        check_vllm_config(config)
    assert_one_sentence(str(error.value))


@refused("Sleep mode")
def test_sleep_mode_is_refused():
    """vLLM 0.33 asks the connector too; 0.32 asks nobody."""
    words = "enable_sleep_mode=True: .*remove --enable-sleep-mode"
    with pytest.raises(ValueError, match=words) as error:
        check_vllm_config(fake_config(enable_sleep_mode=True))
    assert_one_sentence(str(error.value))
    assert not HeteroConnector.supports_sleep_mode(None)


@refused("Dual-batch overlap")
def test_micro_batches_are_refused():
    with pytest.raises(ValueError, match=r"dual-batch overlap .*remove --enable-dbo"):
        check_vllm_config(fake_config(parallel={"use_ubatching": True}))


@refused("torchrun with several ranks")
def test_external_launcher_of_several_ranks_is_refused():
    """torchrun: ranks schedule alone, and nobody adds up their answers."""
    launcher = {"distributed_executor_backend": "external_launcher"}
    words = r"distributed_executor_backend='external_launcher' with 2 ranks: .*use .* mp or ray\."
    with pytest.raises(ValueError, match=words) as error:
        check_vllm_config(fake_config(parallel={**launcher, "world_size": 2}))
    assert_one_sentence(str(error.value))
    check_vllm_config(fake_config(parallel=launcher))
    several = {"distributed_executor_backend": "mp", "world_size": 2}
    check_vllm_config(fake_config(parallel=several))


@pytest.mark.parametrize(
    "worker",
    ["auto", "vllm.v1.worker.gpu_worker.Worker", "vllm_heterocache.worker.worker.AnyWorker"],
)
def test_stock_workers_and_our_own_pass(worker):
    check_vllm_config(fake_config(parallel={"worker_cls": worker}))


def test_our_own_connector_passes_and_a_namesake_does_not():
    config = fake_config()
    config.kv_transfer_config = SimpleNamespace(
        kv_connector="HeteroConnector",
        kv_connector_module_path="vllm_heterocache.connectors.hetero",
    )
    check_vllm_config(config)
    config.kv_transfer_config.kv_connector_module_path = "vllm_heterocache_fork.connector"
    with pytest.raises(ValueError, match="kv_connector='HeteroConnector'"):
        check_vllm_config(config)


def test_every_problem_is_listed():
    config = fake_config(use_mla=True, parallel={"worker_cls": "x.Y", "use_ubatching": True})
    assert len(list(unsupported(config))) == 3


def test_too_small_a_host_pool_is_refused():
    check_host_pool(3 * GIB, 3 * GIB, 8192)
    check_host_pool(0, 0, 8192)
    with pytest.raises(ValueError, match="cpu_pool_gib") as error:
        check_host_pool(3 * GIB, 3 * GIB + 1, 8192)
    message = str(error.value)
    assert message.startswith("heterocache option cpu_pool_gib gives a host pool of 3.00 GiB")
    assert "max_model_len=8192" in message and "--max-model-len" in message
    # the number it asks for is enough, whatever the rounding
    assert "at least 3.01 " in message


def heads_config(head_size: int, num_heads: int, num_kv_heads: int, dtype: str = "torch.bfloat16"):
    """A model with such heads, for `check_kernels`."""
    model = SimpleNamespace(
        model="some/model",
        dtype=dtype,
        get_head_size=lambda: head_size,
        get_num_attention_heads=lambda parallel: num_heads,
        get_num_kv_heads=lambda parallel: num_kv_heads,
    )
    return SimpleNamespace(model_config=model, parallel_config=None, speculative_config=None)


@pytest.mark.parametrize(("group", "most"), [(4, 15), (8, 7), (16, 3)])
def test_a_tile_of_the_decode_kernel_has_room_for_so_many_drafts(group, most):
    config = heads_config(128, 2 * group, 2)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=most)
    check_kernels(config, "cuda")
    config.speculative_config.num_speculative_tokens += 1
    with pytest.raises(ValueError, match=f"use num_speculative_tokens of {most} or less") as found:
        check_kernels(config, "cuda")
    assert_one_sentence(str(found.value))
    check_kernels(config, "cpu")


def test_a_group_that_fills_the_tile_has_room_for_no_draft():
    config = heads_config(128, 33, 1)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=1)
    with pytest.raises(ValueError, match=r"; remove --speculative-config\.") as found:
        check_kernels(config, "cuda")
    assert_one_sentence(str(found.value))


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 16, 24, 64])
def test_heads_that_the_cuda_kernels_take(head_size, group):
    check_kernels(heads_config(head_size, 2 * group, 2), "cuda")
    check_kernels(heads_config(head_size, 2 * group, 2, "torch.float16"), "cuda")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(
            heads_config(96, 8, 2),
            "heads of 96 .*heads of 64, 128, 256.*another attention backend",
            marks=refused("Heads of other sizes than 64, 128 and 256 on CUDA"),
        ),
        pytest.param(
            heads_config(128, 65, 1),
            "with 65 query heads each.*up to 64",
            marks=refused("More than 64 query heads a KV head on CUDA"),
        ),
        pytest.param(
            heads_config(128, 8, 2, "torch.float32"),
            "dtype='float32'.*--dtype bfloat16 or float16",
            marks=refused("float32 on CUDA"),
        ),
    ],
)
def test_heads_and_dtypes_that_only_the_cpu_takes(config, words):
    with pytest.raises(ValueError, match=words) as refused:
        check_kernels(config, "cuda")
    assert_one_sentence(str(refused.value))
    check_kernels(config, "cpu")


def test_a_window_longer_than_every_prompt_is_refused():
    def config(max_model_len: int) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))

    words = r"policy_options={'window': 2049} .*max_model_len=2048, .*choose a smaller window"
    for policy in (SnapKV(window=2049), RocketKV(window=2049)):
        with pytest.raises(ValueError, match=words) as refusal:
            check_policy(config(2048), policy, "cpu")
        assert str(refusal.value).count("; ") == 1
    check_policy(config(2048), SnapKV(window=2048), "cpu")
    check_policy(config(16), SnapKV(), "cpu")  # nobody chose its 32 queries
    check_policy(config(16), H2O(), "cpu")
    check_policy(SimpleNamespace(model_config=None), SnapKV(window=2049), "cpu")


def test_a_policy_that_waits_inside_a_step_is_refused_with_cuda_graphs():
    def config(enforce_eager: bool) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(enforce_eager=enforce_eager))

    with pytest.raises(ValueError, match=r"policy 'oracle' .*add --enforce-eager") as refusal:
        check_policy(config(False), Oracle(), "cuda")
    assert_one_sentence(str(refusal.value))
    check_policy(config(True), Oracle(), "cuda")
    check_policy(config(False), Oracle(), "cpu")  # it has no graphs
    check_policy(SimpleNamespace(model_config=None), Oracle(), "cuda")
    for policy in (Quest(), RocketKV(), FIER()):
        check_policy(config(False), policy, "cuda")


def test_prompts_too_long_for_a_drift_check_are_refused_on_cuda():
    def config(max_model_len: int) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))

    options = HeteroCacheConfig()
    words = r"max_model_len=2097153: .*use --max-model-len 2097152 or .*drift_threshold to 0\."
    with pytest.raises(ValueError, match=words) as refusal:
        check_length(config(2097153), options, HeteroCache(), "cuda")
    assert_one_sentence(str(refusal.value))
    check_length(config(2097152), options, HeteroCache(), "cuda")
    check_length(config(2097153), options, HeteroCache(), "cpu")
    check_length(config(2097153), HeteroCacheConfig(drift_threshold=0), HeteroCache(), "cuda")
    check_length(config(2097153), options, Full(), "cuda")
    check_length(SimpleNamespace(model_config=None), options, HeteroCache(), "cuda")
