"""Measure speed, memory and size at every number of bits beside the dense model, in one run: ``compress bench``.

All candidates take their turn in every round, in an order that rotates, so that a busy machine is busy for all of them. Ratios are
medians of the ratios within a round. Loading and memory are measured in fresh processes, also in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.decoding import Short
from compress.defaults import usual_defaults
from compress.errors import CompressError
from compress.evals.agreement import dense_model_of
from compress.evals.evaluate import load_bits
from compress.evals.fresh import in_fresh_process
from compress.evals.llama_cpp import LlamaCpp, opened
from compress.evals.perplexity import context_length
from compress.evals.store import Key, Results, identity, prompt_key, versions
from compress.evals.timing import now, spread
from compress.hf import cache_name
from compress.hub import place_of
from compress.inspect import inspect
from compress.loading import read_config
from compress.models import empty_model, text_config
from compress.passes import Progress
from compress.sidecars import Choice
from compress.weights import Checkpoint

Times = dict[str, list[float]]
DENSE = "dense"
PRUNED = "pruned"
_LOAD = """
import psutil, torch
import compress
from compress.loading import read_config
from compress.models import empty_model

folder, bits, dtype, device, adapter = request
dtype = getattr(torch, dtype)
config = read_config(folder)
config.quantization_config = None
empty_model(config)  # imports the model class, which is not part of loading
on_gpu = torch.device(device).type == "cuda"
if on_gpu:
    torch.zeros(1, device=device)
held = (lambda: torch.cuda.memory_allocated(device)) if on_gpu else (lambda: psutil.Process().memory_info().rss)
start, begun = held(), time.perf_counter()
model = compress.load(folder, bits=bits, dtype=dtype, device_map=device, adapter=adapter)
loaded = time.perf_counter() - begun
with torch.inference_mode():
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
print(json.dumps({"load_seconds": loaded, "resident_bytes": held() - start}))
"""


@dataclass(frozen=True)
class Load:
    """Say what is timed."""

    prompt: int = 128  # tokens
    tokens: int = 32  # decoded one by one after it
    rounds: int = 7  # turns of every candidate
    loads: int = 3  # fresh processes per candidate

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.loads < 1:
            raise CompressError("bench: at least one round and one load are needed.")


@usual_defaults()
def bench(
    folder: str,
    bits: Sequence[int | float] | None = None,
    reference: str | None = None,
    load: Load | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    exact: bool = True,
    store: Results | None = None,
    progress: Progress | None = None,
    adapter: Choice = None,
    gguf: Sequence[Path] = (),
) -> dict[str, Any]:
    """Measure a checkpoint at several numbers of bits, and the dense model it was made from.

    Args:
        folder: checkpoint, or a dense model (measured alone).
        bits: numbers of bits; all there are if None.
        reference: dense model; the recipe's if None. Without one none is measured, and the result says so. A checkpoint without
            packed matrices is measured beside the one that is given, as ``pruned``.
        load: what is timed.
        dtype: of activations and dense weights.
        device: where it runs.
        exact: as for :func:`compress.load`.
        store: the result is added to it.
        progress: called with (what, done, total).
        adapter: as for :func:`compress.load`; the dense model has none.
        gguf: files of the same model, which llama.cpp's ``llama-bench`` times in the same turns, threads and lengths.

    Returns:
        ``{"model", "backend", "device", "dtype", "threads", "load", "dense", "widths": {"dense" | "4": {
        "decode_tokens_per_second", "prefill_tokens_per_second", "time_to_first_token_seconds", "switch_seconds",
        "load_seconds", "resident_bytes": {"median", "low", "high"}, "decode_versus_dense", "prefill_versus_dense",
        "disk_bytes"}}}``; ``dense`` is the dense model's folder, or why there is none. Switching is changing the number of
        bits and computing a token. Resident bytes are those after a token above those before loading; on a GPU, allocated bytes.
        With ``gguf`` also ``"llama_cpp"``: the same figures of each file by name, without switching, loading and memory.

    Raises:
        CompressError: no such model, number of bits or device, a prompt beyond the context, or what ``gguf`` asks for is not there.
    """
    folder = place_of(folder)
    peers = opened(gguf, lambda: _weights(folder), torch.get_num_threads(), device)
    load, progress = load or Load(), progress or (lambda *done: None)
    model, all_bits = _open(folder, bits, load, dtype=dtype, device_map=device, exact=exact, adapter=adapter)
    dense, note = _dense(folder, reference, bool(all_bits))
    places, models = _candidates(folder, model, all_bits, dense, dtype=dtype, device_map=device)
    setting = _setting(load, dtype, device, exact)
    times = _times(models, all_bits, peers, load, device, progress)
    fresh = _fresh_loads(places, all_bits, load.loads, setting["dtype"], device, progress, adapter)
    sizes = {name: _disk_bytes(place, name if name in all_bits else None) for name, place in places.items()}
    figures = _all_figures(sizes, times, load)
    widths = {name: figures[name] | {what: spread(v) for what, v in found.items()} for name, found in fresh.items()}
    result = {"model": folder, **setting, "dense": note, "widths": widths}
    if peers:
        result["llama_cpp"] = _all_figures(
            {name: peer.path.stat().st_size for name, peer in peers.items()}, times, load
        )
    if store is not None:
        _store(store, result, setting, adapter)
    return result


def _store(store: Results, result: dict[str, Any], setting: dict[str, Any], adapter: Choice) -> None:
    """Add a result to those kept."""
    folder = result["model"]
    key = Key("bench", "bench", identity(folder), "all", *prompt_key(folder, False, setting, adapter))
    store.add(key, {}, result=result)


def _open(
    folder: str, bits: Sequence[int | float] | None, load: Load, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the checkpoint with its numbers of bits by label, and refuse what cannot be timed before any long work."""
    model, found = load_bits(folder, bits, **options)
    all_bits = {label: value for label, value in found.items() if value is not None}
    for value in all_bits.values():
        compress.set_bits(model, value)
    if load.prompt + load.tokens > (context := context_length(model, 1 << 30)):
        asked = f"{load.prompt} + {load.tokens} tokens"
        raise CompressError(f"{asked}: the context holds {context}; lower --prompt-tokens.")
    return model, all_bits


def _candidates(
    folder: str, model: PreTrainedModel, all_bits: Mapping[str, Any], dense: str | None, **options: Any
) -> tuple[dict[str, str], dict[str, PreTrainedModel]]:
    """Return the folders and models of all candidates by name, the dense model first if there is one."""
    places = dict.fromkeys(all_bits or [PRUNED if dense != folder else DENSE], folder)
    models = dict.fromkeys(places, model)
    if dense is None or dense == folder:
        return places, models
    return {DENSE: dense, **places}, {DENSE: compress.load(dense, adapter=False, **options), **models}


def _weights(folder: str) -> int:
    """Return the number of weights of the dense model that a checkpoint was made from, tied ones once."""
    model = empty_model(read_config(folder))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def _setting(load: Load, dtype: torch.dtype, device: str, exact: bool) -> dict[str, Any]:
    """Return what figures depend on beside the model."""
    return {
        "backend": compress.backend(),
        "device": _device_name(device),
        "dtype": str(dtype)[6:],
        "exact": exact,
        "threads": torch.get_num_threads(),
        "load": asdict(load),
        "versions": versions(),
    }


def _dense(folder: str, reference: str | None, packed: bool) -> tuple[str | None, str]:
    """Return the dense model's folder and what the result says of it."""
    if not packed and reference is None:
        return folder, folder
    try:
        found = dense_model_of(folder, reference)
    except CompressError as error:
        if reference is not None:
            raise
        return None, f"not measured: {error}"
    return found, found


@dataclass(frozen=True)
class _Times:
    """Hold seconds by candidate, one figure a round: to the first token, per later token, and to switch."""

    first: Times = field(default_factory=partial(defaultdict, list))
    decode: Times = field(default_factory=partial(defaultdict, list))
    switch: Times = field(default_factory=partial(defaultdict, list))


def _times(
    models: Mapping[str, PreTrainedModel],
    all_bits: Mapping[str, Any],
    peers: Mapping[str, LlamaCpp],
    load: Load,
    device: str,
    progress: Progress,
) -> _Times:
    """Time every candidate in every round."""
    names = [*models, *peers]
    times = _Times()
    vocabulary = int(text_config(next(iter(models.values())).config).vocab_size)
    prompt = torch.randint(vocabulary, (1, load.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    for turn in range(-1, load.rounds):  # the first round is not counted: caches fill, code is compiled
        for place in range(len(names)):
            name = names[(turn + 1 + place) % len(names)]
            switch = _switch(models[name], all_bits[name], prompt[:, :1]) if name in all_bits else None
            if name in peers:
                first, decode = peers[name].times(load.prompt, load.tokens)
            else:
                first, decode = _generate(models[name], prompt, load.tokens)
            if turn >= 0:
                times.first[name].append(first)
                times.decode[name].append(decode)
                times.switch[name] += [] if switch is None else [switch]
            progress(f"timing {name}", (turn + 1) * len(names) + place + 1, (load.rounds + 1) * len(names))
    return times


@torch.inference_mode()
def _switch(model: PreTrainedModel, bits: Any, token: Tensor) -> float:
    """Return the seconds to change the number of bits and compute a token, which makes what is made once for them."""
    begun = now(token.device)
    compress.set_bits(model, bits)
    model(input_ids=token)
    return now(token.device) - begun


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """Return the seconds until the first token is known, and those for each of ``tokens`` later ones (greedy), as ``generate`` takes them."""
    name, begun = cache_name(model), now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    middle, cache = now(prompt.device), output[name]
    short = Short(model, cache) if Short.fits(model) else None
    for _ in range(tokens):
        logits = None if short is None else short(token)
        if logits is None:
            logits = model(input_ids=token, use_cache=True, **{name: cache}).logits
        token = logits[:, -1:].argmax(-1)
    return middle - begun, (now(prompt.device) - middle) / tokens


def _fresh_loads(
    places: Mapping[str, str],
    all_bits: Mapping[str, Any],
    loads: int,
    dtype: str,
    device: str,
    progress: Progress,
    adapter: Choice,
) -> dict[str, Times]:
    """Measure load seconds and resident bytes in new processes, candidates in turn."""
    found: dict[str, Times] = {name: {"load_seconds": [], "resident_bytes": []} for name in places}
    for turn in range(loads):
        for place, (name, folder) in enumerate(places.items()):
            choice = False if name == DENSE else str(adapter) if isinstance(adapter, Path) else adapter
            for what, value in in_fresh_process(_LOAD, [folder, all_bits.get(name), dtype, device, choice]).items():
                found[name][what].append(float(value))
            progress(f"loading {name}", turn * len(places) + place + 1, loads * len(places))
    return found


def _all_figures(sizes: Mapping[str, int | None], times: _Times, load: Load) -> dict[str, dict[str, Any]]:
    """Return the figures of every candidate, with its bytes on disk."""
    return {name: _figures(name, times, load) | {"disk_bytes": size} for name, size in sizes.items()}


def _figures(name: str, times: _Times, load: Load) -> dict[str, Any]:
    found: dict[str, Any] = {
        "decode_tokens_per_second": spread([1 / seconds for seconds in times.decode[name]]),
        "prefill_tokens_per_second": spread([load.prompt / seconds for seconds in times.first[name]]),
        "time_to_first_token_seconds": spread(times.first[name]),
    }
    if times.switch[name]:
        found["switch_seconds"] = spread(times.switch[name])
    if DENSE in times.first:
        for what, of in (("decode", times.decode), ("prefill", times.first)):
            ratios = [theirs / ours for theirs, ours in zip(of[DENSE], of[name], strict=True)]
            found[f"{what}_versus_dense"] = spread(ratios)
    return found


def _disk_bytes(folder: str, bits: str | None) -> int | None:
    """Return the bytes of the tensors that loading (at a number of bits) reads; None for a hub id."""
    if not Path(folder).is_dir():
        return None
    if bits is None:
        return sum(item.nbytes for item in Checkpoint(Path(folder)).info().values())
    return inspect(Path(folder))["bytes_at_bits"].get(bits)  # type: ignore[no-any-return]


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return device
