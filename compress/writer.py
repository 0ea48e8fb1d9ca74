"""Write the checkpoint folder: shards grouped by bits, configuration, manifest; there whole or not at all."""

import json
import math
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.card import write_card
from compress.carrying import Call
from compress.config import METHOD, format_version, index_name
from compress.errors import CompressError
from compress.hf import bits_by_module, packed_modules
from compress.hub import files_beside
from compress.manifest import MANIFEST, noted
from compress.quant.records import bits_range, first_bits
from compress.streaming import State, StreamedModel, built, open_tensors, stored_state
from compress.structure import block_of, is_linear
from compress.version import __version__
from compress.weights import SINGLE, Checkpoint, TensorInfo, sha256_of
from compress.workspace import save_atomic, write_atomic

_LARGEST_SHARD = 4 << 30
_SMALLEST_SHARD = 64 << 20


def write_checkpoint(
    state: State,
    source: Path,
    target: Path,
    manifest: dict[str, Any],
    probe_tokens: Sequence[int],
    device: torch.device,
    write_sidecars: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a state as an ordinary Hugging Face folder, in one move at the very end.

    Tokenizer and generation settings are copied from ``source``, the dense model's folder. Files, sizes, and what the
    model makes of ``probe_tokens`` at all bits (for ``verify``) are added to the manifest.
    """
    running, state = state, stored_state(state)
    info = state.source.info()
    needed, free = sum(item.nbytes for item in info.values()), shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        raise CompressError(
            f"{target.parent}: the checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; what is finished "
            "is kept: free space and run again."
        )
    partial = target.with_name(target.name + ".partial")  # beside it: the last step is one move
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = plan_shards(info, state)
    for file, names in shards.items():
        save_atomic(partial / file, state.source.read(names), {"format": "pt"})
    _write_indexes(partial, shards, info, state)
    _write_config(partial, state)
    for name, path in files_beside(source).items():
        (partial / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, partial / name)
    write_sidecars(partial)
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    at = {bits: sum(info[name].nbytes for name in names) for bits, names in _needed_at(info, state).items()}
    sizes: dict[str, Any] = {"files": sum(path.stat().st_size for path in files.values()), "tensors": at.pop(None)}
    if at:
        sizes["tensors_at_bits"] = {str(bits): size for bits, size in at.items()}
    whole = {
        "format_version": format_version(state.packed.values(), state.shapes),
        "compress_version": __version__,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "safetensors", "numpy")},
        **manifest,
        "not_quantised": not_quantised(running, manifest["passes"]),
        "sizes": sizes,
        "files": {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()},
        "probe": probe(partial, running, probe_tokens, device),
    }
    write_atomic(partial / MANIFEST, json.dumps(whole, indent=1) + "\n")
    write_card(partial, source=source)
    if target.exists():
        target.rmdir()  # empty: the pipeline has refused anything else
    partial.replace(target)


def _needed_at(info: Mapping[str, TensorInfo], state: State) -> dict[int | None, list[str]]:
    """List the tensors that loading at some bits reads (None: at all), a module with fewer at most staying at its most."""
    needed: dict[int | None, list[str]] = {None: list(info)}
    steps = {name: _step_of(name, state) for name in info}
    for bits in bits_range(state.packed.values()):
        needed[bits] = [name for name, step in steps.items() if (step or 0) <= bits]
    return needed


def _step_of(name: str, state: State) -> int | None:
    """Return the fewest bits of the model that read a tensor; None for one that is always read."""
    shape, own = state.packed.get(name.rpartition(".")[0]), first_bits(name)
    return None if shape is None or own is None or own <= shape.seed_bits else shape.step(own)


def plan_shards(info: Mapping[str, TensorInfo], state: State) -> dict[str, list[str]]:
    """Group tensors into files: all that a further bit adds lie together; a shard is about a block large.

    The files of packed tensors are ``model-<bits>bit-00001-of-00002.safetensors``: loading at fewer bits opens none.
    """
    first = min(bits_range(state.packed.values()), default=None)
    structure, blocks = state.structure, Counter[int]()
    groups: dict[str, list[str]] = {}
    for name in sorted(info):
        step = _step_of(name, state)
        label = "model" if first is None else f"model-{max(step or first, first)}bit"
        groups.setdefault(label, []).append(name)
        if (place := block_of(name, structure)) is not None:
            blocks[place] += info[name].nbytes
    # A shard is in memory while it is written, so it may be as large as a block, not as large as the model.
    limit = min(_LARGEST_SHARD, max([*blocks.values(), _SMALLEST_SHARD]))
    shards: dict[str, list[str]] = {}
    for label, names in sorted(groups.items()):
        parts: list[list[str]] = [[]]
        held = 0
        for name in names:
            if held and held + info[name].nbytes > limit:
                parts.append([])
                held = 0
            parts[-1].append(name)
            held += info[name].nbytes
        for number, part in enumerate(parts, 1):
            single = label == "model" and len(parts) == 1
            shards[SINGLE if single else f"{label}-{number:05}-of-{len(parts):05}.safetensors"] = part
    return shards


def _write_indexes(folder: Path, shards: Mapping[str, list[str]], info: Mapping[str, TensorInfo], state: State) -> None:
    file_of = {name: file for file, names in shards.items() for name in names}
    for bits, names in _needed_at(info, state).items():
        if bits is None and SINGLE in shards:
            continue
        total = sum(info[name].nbytes for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": {name: file_of[name] for name in sorted(names)}}
        write_atomic(folder / index_name(bits), json.dumps(index, indent=1))


def _write_config(folder: Path, state: State) -> None:
    state.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if state.packed or state.shapes:
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": format_version(state.packed.values(), state.shapes),
            "bits": None,
            "modules": {name: vars(shape) for name, shape in state.packed.items()},
        }
    if state.shapes:
        config["quantization_config"]["pruned"] = {name: vars(shape) for name, shape in state.shapes.items()}
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def not_quantised(state: State, passes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """List every linear (and embedding) that stays dense, with the reason."""
    model = StreamedModel(state, torch.device("meta"))
    reasons = dict(noted({"passes": passes}, "skipped"))
    default = "the recipe has no quantising pass"
    outside = (
        "outside the blocks; a quantising pass takes it where embedding_bits is not 0" if state.packed else default
    )
    inside = (name for index in range(len(model.blocks)) for name in model.linears(index))
    found = {name: reasons.get(name, default) for name in inside} | dict.fromkeys(model.outside(), outside)
    beyond = [name for name, module in model.model.named_modules() if is_linear(module) and name not in found]
    others = [name for name in beyond if block_of(name, state.structure) is None]
    found |= dict.fromkeys(others, "outside the blocks of the language model")
    extra = [name for name, info in state.beside.info().items() if len(info.shape) > 1] if state.beside else []
    return found | dict.fromkeys(extra, "in the files beyond the model, and kept as it is") | dict(state.structure.left)


@torch.no_grad()
def probe(folder: Path, running: State, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Compute what a checkpoint makes of a few tokens at all bits: its loss, which must be finite, and the last position's largest logits."""
    empty = built(running.config, running.packed, running.shapes)
    state = replace(running, source=open_tensors(Checkpoint(folder), empty, running.structure))
    model = StreamedModel(state, device)
    ids = torch.tensor(list(tokens)[:64] if len(tokens) > 1 else [0, 1])
    hidden, calls = dict[int, Tensor](), dict[int, list[Call]]()
    for bits in bits_range(state.packed.values()) or [0]:
        set_all_bits(model.model, state, bits)
        hidden[bits], calls[bits] = model.capture(ids)  # what blocks are given may come from a packed embedding
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            for bits in hidden:
                set_all_bits(model.model, state, bits)
                hidden[bits] = model.run(block, hidden[bits], calls[bits][index])
    results = {}
    for bits, value in hidden.items():
        set_all_bits(model.model, state, bits)
        label = str(bits) if bits else "dense"
        results[label] = describe(model.logits(ids, value), ids)
        if not math.isfinite(results[label]["loss"]):
            raise CompressError(
                f"at {label}{' bits' * bool(bits)} the model's loss on a few tokens is not finite; check the dense model's weights."
            )
    return {"tokens": ids.tolist(), "at_bits": results}


def set_all_bits(model: torch.nn.Module, state: State, bits: int) -> None:
    """Switch every packed module of a streamed model; nothing for 0 bits."""
    modules = packed_modules(model)
    for name, value in bits_by_module(bits, state.packed).items() if bits else ():
        modules[name].bits = value


def describe(logits: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Return the loss and the eight largest logits after the last token; ``logits`` is [T, vocabulary]."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:].to(logits.device))
    top = logits[-1].float().topk(min(8, logits.shape[-1]))
    return {
        "loss": loss.item(),
        "top": [[i, v] for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
    }
