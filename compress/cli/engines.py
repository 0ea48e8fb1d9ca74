"""Start a server of OpenAI's interface for a checkpoint: vLLM in a process of its own, or transformers' own server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.config import read_settings
from compress.errors import CompressError
from compress.quant.records import packed_bytes, unstacked
from compress.sidecars import ADAPTER_FOLDER, PROMPTS_FOLDER
from compress.vllm.settings import Settings, held_bits, unserved
from compress.weights import Checkpoint

ENGINES = ("vllm", "transformers")
_TRANSFORMERS = (
    "import sys, compress; from transformers.cli.serve import Serve; "
    "Serve(force_model=sys.argv[1], host=sys.argv[2], port=int(sys.argv[3]))"
)
_NEEDS = ("fastapi", "uvicorn", "openai")  # what transformers' server imports beyond transformers itself
_PATIENCE = 30  # seconds that a server has to end


@dataclass(frozen=True)
class Serving:
    """Say what is served, where, and by what."""

    folder: Path
    settings: Settings
    host: str
    port: int
    api_key: str | None
    more: tuple[str, ...]  # arguments for vLLM

    @property
    def name(self) -> str:
        """Return what requests call the model."""
        return self.folder.resolve().name

    @property
    def address(self) -> str:
        """Return where the interface is."""
        shown = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{shown}:{self.port}"


def choose_engine(folder: Path, asked: str | None, model_type: str) -> tuple[str, str]:
    """Return the engine that serves a checkpoint, and why not the other one where nobody asked for it.

    Raises:
        CompressError: the engine asked for is not there, or cannot serve this checkpoint.
    """
    stored = read_settings(folder)
    reason = None if stored is None else unserved(stored, model_type)
    if asked not in (None, *ENGINES):
        raise CompressError(f"--engine {asked}: there are {' and '.join(ENGINES)}.")
    if asked != "transformers":
        missing = reason or (None if find_spec("vllm") else "vLLM is not installed")
        if missing is None:
            return "vllm", ""
        if asked == "vllm":
            raise CompressError(f"{folder}: vLLM cannot serve it: {missing}; --engine transformers can.")
        reason = missing
    absent = [name for name in _NEEDS if find_spec(name) is None]
    if absent:
        raise CompressError(
            f"transformers' server needs {', '.join(absent)}: pip install 'transformers[serving]' (or install vLLM, the faster one)."
        )
    return "transformers", reason or ""


def served_bits(folder: Path, settings: Settings) -> tuple[Mapping[str, int], int]:
    """Return the bits of every packed matrix, and the bytes of all tensors at the bits that are kept in memory."""
    stored, info = read_settings(folder), Checkpoint(folder).info()
    if stored is None:
        if settings != Settings():
            raise CompressError(f"{folder}: is not a compressed checkpoint, so it has no bits to choose from.")
        return {}, sum(item.nbytes for item in info.values())
    held, shapes = held_bits(str(folder), stored, settings, {}), unstacked(stored.shapes())
    packed = stored.shapes()
    dense = sum(
        item.nbytes for name, item in info.items() if name.rpartition(".")[0] not in packed or name.endswith(".bias")
    )
    size = sum(packed_bytes(shapes[name].dense, one.most) for name, one in held.items())
    return {name: one.bits for name, one in held.items()}, dense + size


def vllm_command(serving: Serving, on_cpu: bool) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts vLLM, and its environment."""
    settings = {key: value for key, value in vars(serving.settings).items() if value is not None}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(serving.folder)]
    command += ["--served-model-name", serving.name, "--host", serving.host, "--port", str(serving.port)]
    command += ["--additional-config", json.dumps({"compress": settings})] if settings else []
    if read_settings(serving.folder) is not None:
        command += ["--worker-extension-cls", "compress.vllm.switching.BitsExtension"]
        command += ["--middleware", "compress.vllm.http.BitsMiddleware"]
    if serving.settings.held_bits is not None:
        command += ["--no-enable-prefix-caching"]  # what is kept of earlier text was computed at other bits
    if on_cpu or serving.settings.held_bits is not None:
        command += ["--enforce-eager"]  # graphs of a GPU hold one number of bits; on a CPU compiling gains nothing
    if serving.settings.draft_bits is not None:
        draft = {"method": "draft_model", "model": str(serving.folder), "num_speculative_tokens": 3}
        command += ["--speculative-config", json.dumps(draft)]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    if on_cpu:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; vLLM would take nearly all memory
    if serving.api_key:
        environment["VLLM_API_KEY"] = serving.api_key  # a command line can be read by every user of the machine
    return [*command, *serving.more], environment


def make_view(folder: Path, bits: Any, target: Path) -> None:
    """Make a folder that is a checkpoint at some bits, for programs that cannot be told them: links, and a ``config.json``."""
    target.mkdir()
    for path in folder.resolve().iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if bits:
        config["quantization_config"]["bits"] = bits
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def refuse_taken(serving: Serving) -> None:
    """Refuse an address that another program listens at, before a model is loaded."""
    try:
        family = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((serving.host, serving.port))
    except OSError as error:
        raise CompressError(
            f"{serving.host}:{serving.port} cannot be listened at ({error.strerror}); choose another --port or --host."
        ) from error


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], folder: Path | None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for the length of a ``with``; it is asked to end, and ended where it does not."""
    process = subprocess.Popen(command, env=dict(environment), cwd=folder, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(process: subprocess.Popen[bytes], serving: Serving) -> float:
    """Return the seconds until a server answers, and refuse one that ends before."""
    start = time.monotonic()
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{serving.address}/health", timeout=5):
                return time.monotonic() - start
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise CompressError("the server ended before it was ready; what it said last is above.")


def unused_sidecars(folder: Path) -> list[str]:
    """Return which of a checkpoint's adapter and prompts servers do not load by themselves."""
    return [name for name in (ADAPTER_FOLDER, PROMPTS_FOLDER) if (folder / name).is_dir()]


def curl_line(serving: Serving, chats: bool) -> str:
    """Return a request to try."""
    message: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
    path, content = ("chat/completions", message) if chats else ("completions", {"prompt": "def main():"})
    key = " -H 'Authorization: Bearer KEY'" if serving.api_key else ""
    body = json.dumps({"model": serving.name, **content, "max_tokens": 50})
    return f"curl {serving.address}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'"
