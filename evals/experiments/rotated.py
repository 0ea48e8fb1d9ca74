"""Rotate a Llama, which changes its weights and nothing that it says: ``python -m compress.evals.experiments.rotated MODEL OUT``.

As in QuaRot (https://arxiv.org/abs/2404.00456) the hidden states of all blocks, and the values of every head, are multiplied by
orthogonal matrices that are folded into the weights on both sides, so that no weight stands out. Norms' weights go into the linears
behind them; those of the last norm into the head, which is then no longer tied to the embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel

import compress
from compress.errors import CompressError
from compress.evals.grids import script
from compress.loading import load_tokenizer

_TOKENS = 32  # of a made-up text, on which the models are compared
_SAME = 1e-4  # of the largest logit: norms are computed in float32


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64 [size, size], all of them equally likely."""
    found, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    turn: Tensor = found * triangle.diagonal().sign()
    return turn


def _fold(norm: Any, linears: list[nn.Linear], turn: Tensor) -> None:
    for linear in linears:
        linear.weight.copy_(linear.weight * norm.weight @ turn)
    norm.weight.fill_(1)


@torch.no_grad()
def rotate(model: Any, generator: torch.Generator) -> None:
    """Rotate a model in float64, in place; only one of the form of Llama, Mistral or Qwen2 says the same afterwards."""
    config, inner = model.config, model.model
    turn = orthogonal(config.hidden_size, generator)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    config.tie_word_embeddings = False
    inner.embed_tokens.weight.copy_(inner.embed_tokens.weight @ turn)
    _fold(inner.norm, [model.lm_head], turn)
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        _fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], turn)
        _fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], turn)
        for last in (attention.o_proj, mlp.down_proj):
            last.weight.copy_(turn.t() @ last.weight)
            if last.bias is not None:
                last.bias.copy_(last.bias @ turn)
        values, of_head = attention.v_proj, orthogonal(attention.head_dim, generator)
        values.weight.copy_((of_head.t() @ values.weight.unflatten(0, (-1, attention.head_dim))).flatten(0, 1))
        if values.bias is not None:
            values.bias.copy_((values.bias.unflatten(0, (-1, attention.head_dim)) @ of_head).flatten())
        heads = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim))
        attention.o_proj.weight.copy_((heads @ of_head).flatten(1))


@torch.no_grad()
def rotated(model: str, seed: int = 0) -> PreTrainedModel:
    """Return a rotated model, float32.

    Raises:
        CompressError: the model is built otherwise, and rotated would say something else.
    """
    found, generator = compress.load(model, dtype=torch.float64), torch.Generator().manual_seed(seed)
    text = torch.randint(found.config.vocab_size, (1, _TOKENS), generator=generator)
    before, after = found(text).logits, None
    try:
        rotate(found, generator)
        after = found(text).logits
    except (AttributeError, RuntimeError):  # other names, other sizes
        pass
    if after is None or (after - before).abs().max() > _SAME * before.abs().max():
        raise CompressError(
            f"{model}: a model of type {found.config.model_type!r} is not rotated, only one built as a Llama is."
        )
    found.float()  # type: ignore[no-untyped-call]
    return found


def main(
    model: Annotated[str, typer.Argument(help="The dense model, built as a Llama is.")],
    output: Annotated[Path, typer.Argument(help="A folder for the rotated one, in float32.")],
    seed: Annotated[int, typer.Option(help="Of the rotations.")] = 0,
) -> None:
    """Write a model that says the same with other weights."""
    found, tokenizer = rotated(model, seed), load_tokenizer(model)
    found.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    script.run(main)
