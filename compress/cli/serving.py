"""Add the commands that put a model to use."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

from compress.cli.common import (
    AdapterFlag,
    Folder,
    KVBitsOption,
    KVGroupOption,
    KVResidualOption,
    PromptFlag,
    PromptFrom,
    app,
    err,
    known,
    out,
    parse_bits,
    quiet_transformers,
)
from compress.errors import CompressError
from compress.kv_settings import kv_options


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR", callback=known)],
    text: Annotated[str, typer.Argument(help="Text to continue.", metavar="TEXT")],
    bits: Annotated[
        Optional[str], typer.Option(help="Number of bits, or a mean such as 3.5; all there is if absent.")
    ] = None,
    memory: Annotated[Optional[str], typer.Option(help="Choose bits so that tensors fit, for example 2GB.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Say the text to a chat model, in its template.")] = False,
    prompt: PromptFlag = False,
    prompt_from: PromptFrom = None,
    adapter: AdapterFlag = None,
    kv_bits: KVBitsOption = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    draft_bits: Annotated[
        Optional[int],
        typer.Option(help="Draft tokens by the first planes, so many, and check them with all: the same text."),
    ] = None,
) -> None:
    """Continue a text at a number of bits, or with --chat answer it."""
    changes = kv_options(kv_group, kv_residual)
    if changes and kv_bits in (None, "recommended"):
        raise CompressError("--kv-group and --kv-residual go with a number of bits: give --kv-bits.")
    chosen: list[Any] = parse_bits(bits) or [None]
    if len(chosen) > 1:
        raise CompressError(f"--bits {bits!r}: give one number of bits to generate at.")
    import torch
    from transformers import TextStreamer

    from compress.adapters import text_length, virtual_tokens
    from compress.loading import load, load_tokenizer, read_config
    from compress.tokens import set_generation

    quiet_transformers()
    front = prompt_from or prompt
    read_config(folder)  # the first to see what is wrong with a folder
    tokenizer = load_tokenizer(folder)
    ids = _ids(tokenizer, text, chat)
    kv: Any = {"bits": kv_bits, **changes} if changes else kv_bits
    model: Any = load(folder, bits=chosen[0], memory=memory, prompt=front, adapter=adapter, kv=kv, dtype=torch.float32)
    set_generation(model, tokenizer)
    room, given = text_length(model), len(ids)
    if room is not None and given >= room:
        sidecar = " beside the soft prompt" if virtual_tokens(model) else ""
        raise CompressError(f"the text has {given} tokens, but the context has room for {room}{sidecar}.")
    max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room - given)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    tokens = torch.tensor([ids])
    mask, loop = torch.ones_like(tokens), _loop(model, draft_bits, streamer)
    model.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, **loop, **sampling)


def _loop(model: Any, draft_bits: int | None, streamer: Any) -> dict[str, Any]:
    """Return what ``generate`` is given so that it decodes by drafts, by the loop of our own, or by transformers'."""
    from compress.decoding import Short
    from compress.drafting import Decoding, Drafting, view

    if draft_bits is not None:
        return {"custom_generate": Drafting(view(model, draft_bits, exact=False), streamer=streamer)}
    return {"custom_generate": Decoding(streamer=streamer)} if Short.fits(model) else {"streamer": streamer}


def _ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Return the tokens of a text, in the model's chat template if wanted; say where it has one and that is not wanted."""
    from compress.tokens import prompt_tokens

    ids = prompt_tokens(tokenizer, text, chat)
    if not ids:
        raise CompressError("the text has no tokens; give some words.")
    if tokenizer.chat_template and not chat:
        err.print(
            "note: the text is continued as it is; --chat says it to the model in its chat template.", soft_wrap=True
        )
    return ids


@app.command(name="bake-prompt")
def bake_prompt(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    bits: Annotated[
        Optional[int], typer.Option(help="Whose prompt, where there is one for each number of bits.")
    ] = None,
    prompt_from: PromptFrom = None,
) -> None:
    """Write the soft prompt into the vocabulary, as special tokens, for servers that know no adapters."""
    from compress.prompts.baked import bake

    quiet_transformers()
    added = bake(folder, output, bits, prompt_from or True)
    out.print(
        f"{escape(str(output))}: {len(added)} special tokens, {added[0]} to {added[-1]}, which its tokenizer puts first"
    )
