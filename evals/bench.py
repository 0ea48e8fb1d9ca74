"""``compress bench``: speed, memory and size of every width beside the dense model, in one run.

All candidates take their turn in every round, in an order that rotates, so that a busy machine is busy for all of them. Figures are medians
over the rounds with quartiles; ratios are medians of the ratios within a round. Loading and memory are measured in
fresh processes, also in turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.errors import CompressError
from compress.evals.agreement import dense_model_of
from compress.evals.perplexity import context_length
from compress.evals.store import Key, Results, identity, prompt_key, versions
from compress.evals.text import load_widths
from compress.inspect import inspect
from compress.passes import Report
from compress.sidecars import Choice
from compress.weights import Checkpoint

Times = dict[str, list[float]]
DENSE = "dense"

_CHILD = """
import json, sys, time
import psutil, torch
import compress
from compress.pipeline import read_config
from compress.streaming import empty_model

folder, bits, dtype, device, adapter = json.loads(sys.argv[1])
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
    """What is timed.

    Attributes:
        prompt: tokens of the prompt.
        tokens: decoded one by one after it.
        rounds: turns of every candidate.
        loads: fresh processes per candidate.
    """

    prompt: int = 128
    tokens: int = 32
    rounds: int = 7
    loads: int = 3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, as plain data."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "low": low, "high": high}


def bench(
    folder: str, bits: Sequence[int | float] | None = None, reference: str | None = None, load: Load | None = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu", exact: bool = True, store: Results | None = None,
    report: Report | None = None, adapter: Choice = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a checkpoint at several widths, and the dense model it was made from.

    Args:
        folder: checkpoint, or a dense model (measured alone).
        bits: widths; all there are if None.
        reference: dense model; the recipe's if None. Without one to be had, none is measured, and the result says so.
        load: what is timed.
        dtype: of activations and dense weights.
        device: where it runs.
        exact: as for :func:`compress.load`.
        store: the result is added to it.
        report: called with (what, done, total).
        adapter: as for :func:`compress.load`; the dense model has none.

    Returns:
        ``{"model", "backend", "device", "dtype", "threads", "load", "dense", "widths": {"dense" | "4": {"decode_tokens_per_second",
        "prefill_tokens_per_second", "time_to_first_token_seconds", "load_seconds", "resident_bytes": {"median", "low",
        "high"}, "decode_versus_dense", "prefill_versus_dense", "disk_bytes"}}}``; ``dense`` is the dense model's folder, or why
        there is none. Resident bytes are those after a token above those before loading; on a GPU, allocated bytes.

    Raises:
        CompressError: no such model, width or device, or a prompt beyond the context.
    """
    load = load or Load()
    if load.rounds < 1 or load.loads < 1:
        raise CompressError("bench: at least one round and one load are needed.")
    model, found = load_widths(folder, bits, dtype=dtype, device_map=device, exact=exact, adapter=adapter)
    widths = {label: width for label, width in found.items() if width is not None}
    for value in widths.values():
        compress.set_bits(model, value)  # refuses what there is not, before any long work
    dense, note = _dense(folder, reference, bool(widths))
    models: dict[str, PreTrainedModel] = dict.fromkeys(widths, model)
    places: dict[str, str] = dict.fromkeys(widths, folder)
    if dense is not None:
        models = {
            DENSE: compress.load(dense, dtype=dtype, device_map=device, adapter=False) if widths else model,
            **models,
        }
        places = {DENSE: dense, **places}
    if load.prompt + load.tokens > context_length(model, 1 << 30):
        raise CompressError(
            f"{load.prompt} + {load.tokens} tokens: the context holds {context_length(model, 1 << 30)}; lower --prompt-tokens."
        )
    first, decode = _speed(models, widths, load, device, report)
    fresh = _fresh_loads(places, widths, load.loads, str(dtype)[6:], device, report, adapter)
    sizes = {width: _disk_bytes(place, width) for width, place in places.items()}
    figures = {
        width: _figures(width, first, decode, fresh[width], load) | {"disk_bytes": sizes[width]} for width in models
    }
    result = {
        "model": folder, "backend": compress.backend(), "device": _device_name(device), "dtype": str(dtype)[6:],
        "exact": exact, "threads": torch.get_num_threads(), "load": asdict(load), "dense": note, "widths": figures,
        "versions": versions(),
    }  # fmt: skip
    if store is not None:
        setting = {
            name: result[name] for name in ("backend", "device", "dtype", "exact", "threads", "load", "versions")
        }
        key = Key("bench", "bench", identity(folder), "all", *prompt_key(folder, False, setting, adapter))
        store.add(key, {}, result=result)
    return result


def _dense(folder: str, reference: str | None, packed: bool) -> tuple[str | None, str]:
    """The dense model's folder and what the result says of it."""
    if not packed and reference is None:
        return folder, folder
    try:
        found = dense_model_of(folder, reference)
    except CompressError as error:
        if reference is not None:
            raise
        return None, f"not measured: {error}"
    return found, found


def _speed(
    models: Mapping[str, PreTrainedModel], widths: Mapping[str, Any], load: Load, device: str, report: Report | None
) -> tuple[Times, Times]:
    """Seconds to the first token and per later token, of every candidate in every round."""
    names = list(models)
    first: Times = {name: [] for name in names}
    decode: Times = {name: [] for name in names}
    vocabulary = int(next(iter(models.values())).config.vocab_size)
    prompt = torch.randint(vocabulary, (1, load.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    for turn in range(-1, load.rounds):  # the first round is not counted: caches fill, code is compiled
        for place in range(len(names)):
            name = names[(turn + 1 + place) % len(names)]
            if name in widths:
                compress.set_bits(models[name], widths[name])
                models[name](input_ids=prompt[:, :1])  # what is made once per width
            seconds = _generate(models[name], prompt, load.tokens)
            if turn >= 0:
                first[name].append(seconds[0])
                decode[name].append(seconds[1])
            if report is not None:
                report(f"timing {name}", (turn + 1) * len(names) + place + 1, (load.rounds + 1) * len(names))
    return first, decode


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """Greedy: seconds until the first token is known, and seconds for each of ``tokens`` later ones."""
    begun = _now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(prompt.device)
    for _ in range(tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return middle - begun, (_now(prompt.device) - middle) / tokens


def _now(device: torch.device) -> float:
    """Wall time; on one CPU thread its processor time, so that other processes do not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def _fresh_loads(
    places: Mapping[str, str],
    widths: Mapping[str, Any],
    loads: int,
    dtype: str,
    device: str,
    report: Report | None,
    adapter: Choice,
) -> dict[str, Times]:
    """Load seconds and resident bytes of new processes, candidates in turn."""
    found: dict[str, Times] = {name: {"load_seconds": [], "resident_bytes": []} for name in places}
    for turn in range(loads):
        for place, (name, folder) in enumerate(places.items()):
            choice = False if name == DENSE else str(adapter) if isinstance(adapter, Path) else adapter
            request = json.dumps([folder, widths.get(name), dtype, device, choice])
            child = subprocess.run([sys.executable, "-c", _CHILD, request], capture_output=True, text=True, check=False)
            if child.returncode:
                line = child.stderr.strip().splitlines()[-1] if child.stderr.strip() else "no message"
                raise CompressError(f"{folder}: a fresh process cannot load it ({line}).")
            for what, value in json.loads(child.stdout.splitlines()[-1]).items():
                found[name][what].append(float(value))
            if report is not None:
                report(f"loading {name}", turn * len(places) + place + 1, loads * len(places))
    return found


def _figures(width: str, first: Times, decode: Times, fresh: Times, load: Load) -> dict[str, Any]:
    found: dict[str, Any] = {
        "decode_tokens_per_second": spread([1 / seconds for seconds in decode[width]]),
        "prefill_tokens_per_second": spread([load.prompt / seconds for seconds in first[width]]),
        "time_to_first_token_seconds": spread(first[width]),
        **{what: spread(values) for what, values in fresh.items()},
    }
    if DENSE in first:
        for what, times in (("decode", decode), ("prefill", first)):
            ratios = [theirs / ours for theirs, ours in zip(times[DENSE], times[width], strict=True)]
            found[f"{what}_versus_dense"] = spread(ratios)
    return found


def _disk_bytes(folder: str, width: str) -> int | None:
    """Bytes of the tensors that loading at the width reads; None for a hub id."""
    if not Path(folder).is_dir():
        return None
    if width == DENSE:
        return sum(item.nbytes for item in Checkpoint(Path(folder)).info().values())
    return inspect(Path(folder))["bytes_at_bits"].get(width)  # type: ignore[no-any-return]


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return device
