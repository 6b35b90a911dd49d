"""Decode long prompts, whose pages are fetched, with vLLM's check for hidden GPU synchronisation
switched on.

usage: sync_check.py MODEL OPTIONS, the second as JSON. A process of its own: vLLM reads the switch
when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_GPU_SYNC_CHECK"] = "error"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

OPTIONS = {"gpu_budget": 0.3, "cpu_pool_gib": 4}


def main() -> None:
    from vllm import LLM, SamplingParams

    from common.forced_triggers import EXTENSION

    options = OPTIONS | json.loads(sys.argv[2])
    llm = LLM(
        sys.argv[1],
        max_model_len=20000,
        max_num_seqs=4,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=16 << 30,
        disable_log_stats=False,
        attention_backend="heterocache",
        additional_config={"heterocache": options},
        worker_extension_cls=EXTENSION,
    )
    if options.get("finder_share") == 0:  # else finders fetch, and nothing is checked
        llm.collective_rpc("force_triggers", args=(0.3,))
    prompts = [{"prompt_token_ids": list(range(7, 9007 + 1000 * i))} for i in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)
    fetched = [m.value for m in llm.get_metrics() if m.name.endswith("pages_fetched")]
    assert sum(fetched) > 0, "no page was fetched"
    print("99 steps without a wait")


if __name__ == "__main__":
    main()
