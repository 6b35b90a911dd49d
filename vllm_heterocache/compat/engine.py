"""What the plugin reads of, and does to, a running engine's objects: ranks, runner, KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_heterocache import compat
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np


def kv_heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> list[int]:
    """Global KV heads of a tensor-parallel rank; heads are replicated where ranks outnumber
    them (vLLM's QKVParallelLinear)."""
    if num_kv_heads >= tp_size:
        per_rank = num_kv_heads // tp_size
        return list(range(tp_rank * per_rank, (tp_rank + 1) * per_rank))
    return [tp_rank // (tp_size // num_kv_heads)]


def workers_per_host(parallel_config: Any) -> int:
    """Workers of this deployment that share one host's memory.

    Asked in the front end: engine processes do not know of the other data-parallel replicas.
    """
    return parallel_config.local_world_size * max(1, parallel_config.data_parallel_size_local)


def layers_of_pp_rank(num_layers: int, pp_rank: int, pp_size: int) -> range:
    """Global layer indices of a pipeline-parallel rank."""
    from vllm.distributed.utils import get_pp_indices

    return range(*get_pp_indices(num_layers, pp_rank, pp_size))


class AttentionLayers(NamedTuple):
    """Attention modules of a rank by name."""

    served: dict[str, Any]  # by HeteroCache, in layer order
    sliding: dict[str, Any]  # of the model, over a window; vLLM serves them
    recurrent: dict[str, Any]  # of the model, with a state or anything else that is no attention
    of_drafter: dict[str, Any]


def attention_layers(vllm_config: Any, model: Any) -> AttentionLayers:
    """The layers of the model that have a KV cache, and those of its drafter.

    Args:
        model: the module that is served, without its drafter.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    context = vllm_config.compilation_config.static_forward_context
    served = {id(module) for module in model.modules()}
    of_model: dict[str, Any] = {}
    sliding: dict[str, Any] = {}
    recurrent: dict[str, Any] = {}
    of_drafter: dict[str, Any] = {}
    for name, layer in context.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        if id(layer) not in served:
            of_drafter[name] = layer
        elif not isinstance(layer, Attention):
            recurrent[name] = layer
        else:
            (of_model if layer.sliding_window is None else sliding)[name] = layer
    by_index = sorted(of_model.items(), key=lambda item: extract_layer_index(item[0]))
    return AttentionLayers(dict(by_index), sliding, recurrent, of_drafter)


class Rotation(NamedTuple):
    """How a layer rotates its queries (RoPE): vLLM's RotaryEmbedding."""

    cos_sin: torch.Tensor  # [positions, size], cosines of size / 2 frequencies, then sines
    size: int  # leading elements of a head that are rotated
    is_neox: bool  # whether halves are paired, else neighbours


def query_rotations(model: Any, layer_names: Iterable[str]) -> list[Rotation | None] | None:
    """Of each layer; None of a layer that says it has none.

    Models of vLLM keep `rotary_emb` beside the attention layer. Returns None where one does not, or
    where it is of another kind.
    """
    found: list[Rotation | None] = []
    for name in layer_names:
        try:
            rotary = model.get_submodule(name.rpartition(".")[0]).rotary_emb
        except AttributeError:
            return None
        if rotary is not None and not isinstance(rotary, compat.RotaryEmbeddingBase):
            return None
        found.append(
            None
            if rotary is None
            else Rotation(rotary.cos_sin_cache, rotary.rotary_dim, rotary.is_neox_style)
        )
    return found


def rank_of(parallel_config: Any) -> tuple[int, int]:
    """Pipeline- and tensor-parallel rank of this process."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    pp_rank = get_pp_group().rank_in_group if parallel_config.pipeline_parallel_size > 1 else 0
    return pp_rank, get_tensor_model_parallel_rank()


def replace_kv_cache_spec(layer: Any, make_spec: Callable[[Any, Any], Any]) -> None:
    """Let one attention layer report `make_spec(stock_spec, vllm_config)` as its KV-cache spec."""
    get_stock_spec = layer.get_kv_cache_spec
    layer.get_kv_cache_spec = lambda vllm_config: make_spec(
        get_stock_spec(vllm_config), vllm_config
    )


def count_as_weights(model_runner: Any, num_bytes: int) -> None:
    """Let vLLM's memory profile count buffers that were allocated after loading."""
    model_runner.model_memory_usage += num_bytes


RequestIdsReader = Callable[[int, "np.ndarray | None"], list[str]]


def request_ids_reader(model_runner: Any) -> RequestIdsReader:
    """A function that tells the requests of a step's batch while its metadata is being built, row
    by row, from the number of rows and `req_idx` of vLLM's CommonAttentionMetadata. Padding has
    none.

    V1 keeps them in its input batch. V2 gives indices of its request states, without padding; of a
    model with recurrent layers they are noted on their way to the builders. A batch of vLLM's own
    (warm-up, capture, an idle data-parallel rank) has indices too, but of no request, so nobody may
    ask about one.
    """
    if hasattr(model_runner, "input_batch"):
        return lambda num_rows, req_idx: [
            request_id
            for request_id in model_runner.input_batch.req_ids[:num_rows]
            if request_id is not None
        ]
    index_to_req_id = model_runner.req_states.index_to_req_id
    noted = _note_request_states(model_runner.model_state)

    def read(num_rows: int, req_idx: np.ndarray | None) -> list[str]:
        indices = noted[0] if req_idx is None else req_idx
        return [index_to_req_id[index] for index in indices[:num_rows].tolist()]

    return read


def _note_request_states(model_state: Any) -> list[np.ndarray]:
    """One array, of the batch for which V2's model state had metadata built last: that of models
    with recurrent layers hands no `req_idx` on."""
    prepare_attn = model_state.prepare_attn
    noted: list[np.ndarray] = []

    def note_and_prepare(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        noted[:] = [input_batch.idx_mapping_np]
        return prepare_attn(input_batch, *args, **kwargs)

    model_state.prepare_attn = note_and_prepare
    return noted


def left_request_ids(scheduler_output: Any) -> set[str]:
    """Requests whose blocks were freed since the last step: finished, preempted, or started again.

    `preempted_req_ids` lacks those that were preempted between steps (reset_prefix_cache with
    reset_running_requests); V1 resumes them by name, and to V2 they come as new ones.
    """
    cached = scheduler_output.scheduled_cached_reqs
    new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
    preempted = scheduler_output.preempted_req_ids or set()
    return scheduler_output.finished_req_ids | preempted | cached.resumed_req_ids | new


def decode_batch_limits(vllm_config: Any) -> tuple[int, int]:
    """Most rows of a decode batch, the padding of CUDA graphs included, and most queries of one of
    its rows: drafts are verified together with the token behind which they come."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    max_rows = max(vllm_config.scheduler_config.max_num_seqs, captured)
    return max_rows, compat.max_decode_query_len(vllm_config)


def kernel_block_bytes(specs: Iterable[Any]) -> int:
    """Bytes of PAGE_SIZE tokens over all layers of this rank."""
    return sum(spec.page_size_bytes * PAGE_SIZE // spec.block_size for spec in specs)


def kv_cache_managers(kv_cache_manager: Any, kind: type) -> tuple[Any, list[Any]]:
    """The manager of the KV-cache group that HeteroCache serves, and vLLM's own of other groups: of
    layers that slide over a window, of recurrent layers, and of a drafter's.

    Args:
        kind: the class of the first.

    Raises ValueError where vLLM split the group.
    """
    managers = kv_cache_manager.coordinator.single_type_managers
    (ours,) = (manager for manager in managers if isinstance(manager, kind))
    return ours, [manager for manager in managers if manager is not ours]


def own_connector(connector: Any) -> Any:
    """Ours, where vLLM's MultiConnector holds it beside another; it is the first."""
    return getattr(connector, "sub_connectors", [connector])[0]


def own_metadata(metadata: Any) -> Any:
    """What our connector sent with a step, where vLLM's MultiConnector did."""
    return metadata.metadata[0] if hasattr(metadata, "metadata") else metadata


def watch_dead_blocks(block_pool: Any, note: Callable[[list[int]], None]) -> None:
    """Call `note` with the ids of blocks that die, whenever the pool is given blocks back.

    A block dies when it is freed, nobody else uses it, and it is no prefix cache. The pool's
    method is wrapped, as blocks reach it on several ways: from the KV-cache managers, and from
    the scheduler where it holds frees back until the steps in flight are done.
    """
    free_blocks = block_pool.free_blocks

    def is_dead(block: Any) -> bool:
        return block.ref_cnt == 0 and block.block_hash is None and not block.is_null

    def free_and_note(ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        free_blocks(blocks)
        note([block.block_id for block in blocks if is_dead(block)])

    block_pool.free_blocks = free_and_note


def pack_kv_cache(kv_cache_config: Any, layer_names: list[str]) -> Any:
    """The KV-cache config with the layers of the served group's one tensor in layer order.

    Under the layout BLHNC a block id names one page for every layer and KV head, in
    `[num_blocks, L, H, page_size, 2 * head_dim]`. vLLM does not promise the order of its layers.
    The tensors of other groups, in the same memory, stay as they are.

    Raises ValueError where vLLM split the group, or made blocks that are wider than it.
    """
    from dataclasses import replace

    first, tensors = layer_names[0], kv_cache_config.kv_cache_tensors
    (group,) = (one for one in kv_cache_config.kv_cache_groups if first in one.layer_names)
    (tensor,) = (one for one in tensors if first in one.layers)
    page_bytes = _layer_spec(group, first).page_size_bytes
    block_bytes = page_bytes * len(layer_names)
    if len(group.layer_names) < len(layer_names) or tensor.block_stride > block_bytes:
        raise ValueError(
            "--attention-backend heterocache does not support this model: vLLM puts "
            f"{len(group.layer_names)} of its {len(layer_names)} layers with full attention in "
            f"blocks of {tensor.block_stride:,} bytes, and a block must hold one page of each and "
            f"nothing else ({block_bytes:,} bytes); serve it with another attention backend."
        )
    assert sorted(group.layer_names) == sorted(tensor.layers) == sorted(layer_names)
    found = tensor.offset, tensor.layer_stride, tensor.block_stride, tensor.size
    assert found == (0, page_bytes, block_bytes, block_bytes * kv_cache_config.num_blocks)
    packed = [replace(one, layers=layer_names) if one is tensor else one for one in tensors]
    return replace(kv_cache_config, kv_cache_tensors=packed)


def _layer_spec(group: Any, layer_name: str) -> Any:
    """The spec of one layer: vLLM wraps those of a group where groups have pages of other sizes."""
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return group.kv_cache_spec if specs is None else specs[layer_name]


def as_elements(kv_cache: torch.Tensor, dtype: str) -> torch.Tensor:
    """A KV cache in the dtype of its elements: vLLM gives an fp8 cache as bytes.

    Args:
        dtype: the name that the attention layer has for it (`kv_cache_dtype`).
    """
    if dtype not in FP8_ELEMENTS:
        return kv_cache
    return kv_cache.view(getattr(torch, FP8_ELEMENTS[dtype]))


def layer_scales(layers: list[Any], device: torch.device) -> KVScales | None:
    """The scales of loaded attention layers with an fp8 KV cache; None for other caches.

    A layer's buffers hold one scale, or one for each of its KV heads.
    """
    first = layers[0]
    if first.kv_cache_dtype not in FP8_ELEMENTS:
        return None

    def stacked(name: str, width: int) -> torch.Tensor:
        scales = [getattr(layer, name).detach().float().expand(width) for layer in layers]
        return torch.stack(scales).to(device)

    num_kv_heads = first.num_kv_heads
    of_queries = first._q_scale.numel()
    return KVScales(
        stacked("_k_scale", num_kv_heads),
        stacked("_v_scale", num_kv_heads),
        stacked("_q_scale", of_queries),
    )


def packed_pool(kv_cache: torch.Tensor) -> torch.Tensor:
    """The whole packed pool as pages [num_pages, PAGE_SIZE, 2 * head_dim], from any layer's view
    [num_blocks, H, block_size, 2 * head_dim] of it."""
    flat = torch.empty(0, dtype=kv_cache.dtype, device=kv_cache.device)
    flat.set_(kv_cache.untyped_storage())
    return flat.view(-1, PAGE_SIZE, kv_cache.shape[-1])
