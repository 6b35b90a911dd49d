"""What of vLLM serves on this platform, and what of it the plugin cannot work with."""

from __future__ import annotations

from typing import Any

from vllm_heterocache.refusal import Refusal

# vLLM's own backends that take the layout of the pool: of a drafter's layers, and of those that
# slide over a window
STOCK_BACKENDS = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}


def platform_name() -> str | None:
    """ "cpu" or "cuda"; None for a platform that the backend has no kernels for."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    if current_platform.is_cuda() and current_platform.has_device_capability(80):
        return "cuda"
    return None


def check_platform() -> None:
    """Raise Refusal where the backend has no kernels for vLLM's platform."""
    if platform_name() is None:
        from vllm.platforms import current_platform

        raise Refusal(
            "--attention-backend heterocache runs on CUDA (compute capability 8.0 and above) and "
            f"on vLLM's CPU platform, and this is {current_platform.device_name}",
            "use another attention backend here",
        )


def check_runner(vllm_config: Any) -> None:
    """Raise Refusal for a model runner whose batches the backend cannot read."""
    from vllm.platforms import current_platform

    if vllm_config.use_v2_model_runner and current_platform.is_cpu():
        raise Refusal(
            "--attention-backend heterocache reads the batches of vLLM's V1 model runner on the "
            "CPU, and this engine would use V2",
            "set VLLM_USE_V2_MODEL_RUNNER=0",
        )


def check_executor(vllm_config: Any) -> None:
    """Raise Refusal for vLLM 0.32's old Ray executor, which steps the model runner and not the
    worker, so that the plugin would learn of no step."""
    from vllm import envs

    executor: Any = vllm_config.parallel_config.distributed_executor_backend
    is_old = executor == "ray" and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)
    name = executor if isinstance(executor, str) else getattr(executor, "__name__", "")
    if is_old or name.rsplit(".", 1)[-1] == "RayDistributedExecutor":
        raise Refusal(
            "--attention-backend heterocache does not support distributed_executor_backend="
            f"{name!r} with VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0: this executor goes round the "
            "worker",
            "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND and use --distributed-executor-backend ray",
        )


def fp8_prefill(kv_cache_dtype: str, head_size: int) -> bool:
    """Whether FlashAttention on this GPU takes an fp8 KV cache, with heads of this size."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_supports_kv_cache_dtype

    return flash_attn_supports_kv_cache_dtype(kv_cache_dtype, head_size=head_size)
