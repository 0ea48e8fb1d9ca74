"""Choose which tokens of a prompt a cache keeps: the policies that the papers need, as kvpress does not run with current transformers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Policy = Literal["attention", "recent", "random"]
_QUERIES = 32  # of the prompt's end, whose attention tells what matters


def importance(policy: Policy, query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Score every token of a prompt for every head of the keys, float32 [B, H, T]; the largest stay.

    Args:
        policy: ``attention``: summed attention of the prompt's last queries, of all that share a head (SnapKV, arXiv 2404.14469; that what
            was important stays so is Scissorhands, 2305.17118). ``recent`` (StreamingLLM, 2309.17453) and ``random``: controls.
        query: [B, H * n, T, D].
        keys: [B, H, T, D].
        scale: of their products.
    """
    batch, heads, tokens = keys.shape[:3]
    places = torch.arange(tokens, device=keys.device)
    if policy == "recent":
        return places.float().expand(batch, heads, -1)
    if policy == "random":
        generator = torch.Generator().manual_seed(tokens)
        return torch.rand(batch, heads, tokens, generator=generator).to(keys.device)
    asked = torch.unflatten(query[:, :, -_QUERIES:].float(), 1, (heads, -1)) * scale  # [B, H, n, Q, D]
    products = asked @ keys.float()[:, :, None].mT
    later = places[None, :] > places[-asked.shape[3] :, None]
    return products.masked_fill(later, -torch.inf).softmax(-1).sum((2, 3))


def kept_tokens(scores: Tensor, keep: int, first: int, last: int) -> Tensor:
    """Return the places of the tokens that stay, [B, H, keep], in their order: the first, the last, and the best of the rest."""
    tokens = scores.shape[-1]
    if tokens <= keep:
        return torch.arange(tokens, device=scores.device).expand(*scores.shape[:2], -1)
    ranked = scores.clone()
    ranked[..., :first] = torch.inf
    ranked[..., tokens - last :] = torch.inf
    return ranked.topk(keep, -1).indices.sort(-1).values
