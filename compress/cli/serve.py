"""Add the command that starts a server."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

from compress.cli.common import Folder, app, err, out, panel, parse_bits
from compress.errors import CompressError

_VLLM = "vLLM"


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    folder: Folder,
    bits: Annotated[
        Optional[str], typer.Option(help="Number of bits, or a mean such as 3.5; all there are if absent.")
    ] = None,
    memory: Annotated[Optional[str], typer.Option(help="Choose bits so that tensors fit, for example 2GB.")] = None,
    engine: Annotated[
        Optional[str], typer.Option(help="vllm or transformers; vLLM if absent, where it is installed and fits.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        Optional[str], typer.Option(help="Key that requests have to bring.", envvar="VLLM_API_KEY")
    ] = None,
    held_bits: Annotated[
        Optional[int], panel(_VLLM, "Keep up to so many bits in memory, so that POST /compress/bits can change them.")
    ] = None,
    bits_by_load: Annotated[
        Optional[str], panel(_VLLM, "Fewer bits for more requests: 8,4,3, or 8,4:4,3:16 with the numbers of requests.")
    ] = None,
    fast: Annotated[
        bool,
        panel(_VLLM, "Round activations and codebook entries to 8 bits on a CPU: faster, and less exact.", "--fast"),
    ] = False,
    draft_bits: Annotated[
        Optional[str],
        panel(_VLLM, "Guess tokens ahead with the same checkpoint at so many bits; the text stays the same."),
    ] = None,
) -> None:
    """Serve a checkpoint by OpenAI's interface. What follows -- goes to vLLM: -- --max-model-len 4096."""
    from compress.cli import engines
    from compress.loading import load_tokenizer, read_config

    kind, why_not = engines.choose_engine(folder, engine, read_config(folder).model_type)
    given: dict[str, Any] = {"--held-bits": held_bits, "--bits-by-load": bits_by_load, "--draft-bits": draft_bits}
    given |= {"--fast": fast or None, "what follows --": context.args or None, "--api-key": api_key}
    extra = [name for name, value in given.items() if value is not None]
    if kind == "transformers" and extra:
        reason = why_not or "it was asked for"
        raise CompressError(f"{extra[0]}: transformers' server cannot do this, and {reason}; vLLM can.")
    settings = _settings(folder, _one("--bits", bits), memory, held_bits, bits_by_load, fast, draft_bits)
    serving = engines.Serving(folder.resolve(), settings, host, port, api_key, tuple(context.args))
    by_matrix, size = engines.served_bits(folder, settings)
    engines.refuse_taken(serving)
    chats = bool(load_tokenizer(folder).chat_template)
    if why_not:
        err.print(escape(f"note: transformers' own server is used, as {why_not}."), soft_wrap=True)
    for name in engines.unused_sidecars(folder):
        err.print(f"note: {name}/ of the checkpoint is not used by servers (docs/serving.md).", soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _run(serving, kind, by_matrix, size, chats)
    except KeyboardInterrupt:
        err.print("server ended.")


def _settings(
    folder: Path,
    bits: Any,
    memory: str | None,
    held: int | None,
    by_load: str | None,
    fast: bool,
    draft_bits: str | None,
) -> Any:
    """Put options together, and refuse bits that the checkpoint does not have."""
    from compress.cli import engines
    from compress.vllm.load import load_policy
    from compress.vllm.settings import Settings

    draft = _one("--draft-bits", draft_bits)
    later = [] if draft is None else [draft]
    if by_load is not None:
        steps = [number for _, number in load_policy(by_load).steps]
        later += steps
        bits, held = (steps[0] if bits is None else bits), max(held or 0, steps[0])
    for other in later:
        engines.served_bits(folder, Settings(other))
    return Settings(bits, memory, held, draft, False if fast else None, by_load)


def _one(option: str, text: str | None) -> Any:
    """Read one number of bits."""
    numbers: list[Any] = parse_bits(text) or [None]
    if len(numbers) > 1:
        raise CompressError(f"{option} {text!r}: give one number of bits.")
    return numbers[0]


def _run(serving: Any, kind: str, by_matrix: Any, size: int, chats: bool) -> None:
    """Start a server, say what it is once it answers, and wait until it ends."""
    from importlib.metadata import version

    import torch

    from compress.cli import engines
    from compress.config import read_settings
    from compress.vllm.settings import common_bits

    stored = read_settings(serving.folder)
    with tempfile.TemporaryDirectory() as place:
        if kind == "vllm":
            import vllm

            release = f"vLLM {vllm.__version__}"
            command, environment = engines.vllm_command(serving, not torch.cuda.is_available())
        else:
            release, environment = f"transformers {version('transformers')}", dict(os.environ)
            engines.make_view(serving.folder, by_matrix, Path(place) / serving.name)
            command = [sys.executable, "-c", engines._TRANSFORMERS, serving.name, serving.host, str(serving.port)]
        with engines.running(command, environment, Path(place) if kind != "vllm" else None) as process:
            seconds = engines.wait_ready(process, serving)
            shown = f" at {common_bits(by_matrix, stored.shapes())} bits" if stored is not None else ""
            out.print(
                f"{release} serves {escape(serving.name)}{shown}: {size / 1e6:.1f} MB of tensors, ready after {seconds:.0f} s",
                soft_wrap=True,
            )
            out.print(f"{serving.address}/v1 (Ctrl-C ends it)")
            out.print(escape(engines.curl_line(serving, chats)), soft_wrap=True)
            if process.wait():
                raise CompressError(
                    f"the server ended by itself (exit code {process.returncode}); what it said last is above."
                )
