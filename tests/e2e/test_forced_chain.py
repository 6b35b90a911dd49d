"""Questions that arrive after compaction: what the published recipe keeps of stock vLLM's answers.
The default recipe is asked in test_evaluation.py and test_quality_gate.py."""

from __future__ import annotations

import pytest
from engines import chain_engine, run_chains


@pytest.fixture(scope="module")
def right_of_stock(long_model, chain, stock) -> int:
    """Only the 128K model answers well enough to tell recipes apart."""
    right = sum(chain.correct(stock.chain))
    assert right >= 0.9 * len(chain.answers), "the model cannot do this"
    return right


def test_published_recipe_is_measured_at_0_5(long_model, chain, right_of_stock, record_property):
    """Kept for comparison: no target, but it must be far above what evicting methods keep
    (testbed: at most 10 of 32 for SnapKV at 50 %)."""
    with chain_engine(long_model, {"gpu_budget": 0.5, "recipe": "paper"}) as engine:
        right = sum(chain.correct(run_chains(engine, [chain])[0]))
    record_property("right", f"{right} of {right_of_stock}")
    assert right >= 0.5 * right_of_stock
