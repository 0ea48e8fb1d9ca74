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
    out,
    parse_bits,
    quiet_transformers,
)
from compress.errors import CompressError
from compress.kv_settings import kv_options


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Checkpoint, or a dense model.", metavar="DIR")],
    text: Annotated[str, typer.Argument(help="Text to continue.", metavar="TEXT")],
    bits: Annotated[
        Optional[str], typer.Option(help="Number of bits, or a mean such as 3.5; all there is if absent.")
    ] = None,
    memory: Annotated[Optional[str], typer.Option(help="Choose bits so that tensors fit, for example 2GB.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    prompt: PromptFlag = False,
    prompt_from: PromptFrom = None,
    adapter: AdapterFlag = None,
    kv_bits: KVBitsOption = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
) -> None:
    """Continue a text at a number of bits."""
    changes = kv_options(kv_group, kv_residual)
    if changes and kv_bits in (None, "recommended"):
        raise CompressError("--kv-group and --kv-residual go with a number of bits: give --kv-bits.")
    chosen: list[Any] = parse_bits(bits) or [None]
    if len(chosen) > 1:
        raise CompressError(f"--bits {bits!r}: give one number of bits to generate at.")
    import torch
    from transformers import TextStreamer

    from compress.adapters import text_length, virtual_tokens
    from compress.loading import load, load_tokenizer

    quiet_transformers()
    front = prompt_from or prompt
    model: Any = load(
        folder,
        bits=chosen[0],
        memory=memory,
        prompt=front,
        adapter=adapter,
        kv={"bits": kv_bits, **changes} if changes else kv_bits,
        dtype=torch.float32,
    )
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise CompressError("the text has no tokens; give some words.")
    room, given = text_length(model), inputs["input_ids"].shape[1]
    if room is not None and given >= room:
        sidecar = " beside the soft prompt" if virtual_tokens(model) else ""
        raise CompressError(f"the text has {given} tokens, but the context has room for {room}{sidecar}.")
    max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room - given)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=padding, **sampling)


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
