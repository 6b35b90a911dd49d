"""Fixtures of the kernel tests: poisoned outputs, exact attention, the rule for tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from triton_mode import DEVICE


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel allocates without a value holds NaN until it is written."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For tiny tensors: on a busy machine, threads wait for one another ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """On the device of the kernels in `test_*_triton.py`, which compare them there, else on the
    CPU; the same numbers in every run."""
    device = DEVICE if request.path.stem.endswith("_triton") else "cpu"
    return torch.Generator(device).manual_seed(20260113)


@pytest.fixture
def assert_close_to_exact() -> Callable[..., None]:
    """The largest error is at most twice what torch makes of the same inputs in the same dtype."""

    def check(actual: torch.Tensor, exact: np.ndarray, same_dtype: torch.Tensor) -> None:
        assert actual.shape == same_dtype.shape == exact.shape
        assert actual.dtype == same_dtype.dtype
        assert not actual.isnan().any(), "an output was not written, or a poisoned page was read"
        error = np.abs(actual.double().numpy() - exact).max()
        allowed = 2 * np.abs(same_dtype.double().numpy() - exact).max()
        # one rounding of the largest value: torch may be exact by luck where there is one token
        allowed += float(np.abs(exact).max()) * torch.finfo(actual.dtype).eps
        assert error <= allowed, (error, allowed)

    return check


@pytest.fixture
def exact_weights() -> Callable[..., np.ndarray]:
    """softmax(keys . q * scale) of one query vector, float64, key by key."""

    def weights(query: torch.Tensor, keys: torch.Tensor, scale: float) -> np.ndarray:
        query, keys = query.double().numpy(), keys.double().numpy()
        logits = np.array([(query * key).sum() * scale for key in keys])
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()

    return weights
