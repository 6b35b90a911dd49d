"""ChunkKV: whole chunks of text, and one choice for several layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from vllm_heterocache.policies.snapkv import SnapKV
from vllm_heterocache.refusal import options

if TYPE_CHECKING:
    from vllm_heterocache.policies.policy import ObservedPrompt


@options
class ChunkKV(SnapKV):
    """Chunks of the highest attention over the observation window, the same for all heads of a
    layer and for `reuse_layers` layers in turn (Liu et al., arXiv 2502.00299, algorithms 1 and 2;
    chunks of 10 tokens, indices reused by every second layer).

    Here a chunk is `chunk_pages` pages of 16 tokens, the heads of a layer are averaged (as NVIDIA's
    kvpress sums them), and a layer that reuses is not observed at all. Budgets are counted in
    pages, so the last chunk that is taken may be cut. With pipeline parallelism each rank begins
    with a layer that chooses; with tensor parallelism each chooses for its own heads.
    """

    name: ClassVar[str] = "chunkkv"

    chunk_pages: Annotated[int, Field(ge=1)] = 1
    """Pages of a chunk."""
    reuse_layers: Annotated[int, Field(ge=1)] = 2
    """Layers that keep the same chunks, the first of which chooses; 1 lets each choose."""

    def layer_scores(self, mass: torch.Tensor) -> torch.Tensor:
        of_heads = super().layer_scores(mass)
        return self._of_chunks(of_heads.mean(dim=0)).expand_as(of_heads)

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        num_layers = prompt.shape[0]
        masses = (prompt.window_mass(i) for i in range(0, num_layers, self.reuse_layers))
        chosen = [self.layer_scores(mass) for mass in masses]
        layers = [chosen[i // self.reuse_layers] for i in range(num_layers)]
        return self.with_window(prompt, torch.stack(layers))

    def _of_chunks(self, scores: torch.Tensor) -> torch.Tensor:
        """[P] -> [P]: each page takes the mean of its chunk; the last chunk may be shorter."""
        num_pages = scores.shape[0]
        size = min(self.chunk_pages, max(1, num_pages))
        padding = -num_pages % size
        chunks = torch.nn.functional.pad(scores, (0, padding)).view(-1, size)
        means = chunks.sum(dim=1) / size
        means[-1:] *= size / (size - padding)
        return means.repeat_interleave(size)[:num_pages]
