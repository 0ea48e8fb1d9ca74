"""The checkpoint folder: shards grouped by width step, configuration, manifest; there whole or not at all."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.hf import METHOD, format_version, packed_modules, records, widths_for
from compress.loading import index_name
from compress.quant.format import bits_range, width_of
from compress.streaming import State, StreamedModel
from compress.structure import architecture, block_of
from compress.version import __version__
from compress.weights import MANIFEST, SINGLE, Checkpoint, Renamed, TensorInfo, sha256_of
from compress.workspace import save_atomic, write_atomic

_LARGEST_SHARD = 4 << 30
_SMALLEST_SHARD = 64 << 20
_COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write_checkpoint(
    state: State, source: Path, target: Path,
    manifest: dict[str, Any], probe_tokens: Sequence[int], device: torch.device,
    write_beside: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Write a state as an ordinary Hugging Face folder.

    Args:
        state: what to write.
        source: the dense model's folder, whose tokenizer and generation settings are copied.
        target: becomes the checkpoint, in one move at the very end.
        manifest: what the run knows; files, sizes and a probe are added.
        probe_tokens: a few tokens; what the model makes of them at every width is kept for ``verify``.
        device: where the probe is computed.
        write_beside: adds files that are not the model's own.

    Raises:
        CompressError: there is not enough room on the disk.
    """
    running, state = state, stored_state(state)
    info = state.source.info()
    _check_room(sum(item.nbytes for item in info.values()), target.parent)
    partial = target.with_name(target.name + ".partial")  # beside it: the last step is one move
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = plan_shards(info, state)
    for file, names in shards.items():
        save_atomic(partial / file, state.source.read(names), {"format": "pt"})
    _write_indexes(partial, shards, info, state)
    _write_config(partial, state)
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, partial / path.name)
    write_beside(partial)
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    whole = {
        "format_version": format_version(state.packed.values(), state.shapes),
        "compress_version": __version__,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "safetensors", "numpy")},
        **manifest,
        "not_quantised": not_quantised(running, manifest["passes"]),
        "sizes": {"files": sum(path.stat().st_size for path in files.values())} | sizes(info, state),
        "files": {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()},
        "probe": probe(partial, running, probe_tokens, device),
    }
    write_atomic(partial / MANIFEST, json.dumps(whole, indent=1) + "\n")
    if target.exists():
        target.rmdir()  # empty: the pipeline has refused anything else
    partial.replace(target)


def stored_state(state: State) -> State:
    """The same model under the names that checkpoint files use."""
    rename = architecture(state.config).stored_name
    names = {rename(name): name for name in state.source.info()}
    packed = {rename(name): shape for name, shape in state.packed.items()}
    return State(Renamed(state.source, names), state.config, packed, state.key, state.shapes)


def _check_room(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise CompressError(
            f"{folder}: the checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; what is finished is "
            "kept: free space and run again."
        )


def widths_of(state: State) -> list[int]:
    """Every width a checkpoint can be loaded at as a whole; empty for a dense one."""
    return list(bits_range(state.packed.values()))


def _needed_at(name: str, bits: int, state: State) -> bool:
    """Whether loading at a width reads a tensor: a module above its own parent width stays at the parent."""
    first = width_of(name)
    module = name.rpartition(".")[0]
    if first is None or module not in state.packed:
        return True
    return first <= max(bits, state.packed[module].seed_bits)


def sizes(info: Mapping[str, TensorInfo], state: State) -> dict[str, Any]:
    """Bytes of tensor data in the files, read at each width."""
    if not state.packed:
        return {"tensors": sum(item.nbytes for item in info.values())}
    at = {
        str(bits): sum(item.nbytes for name, item in info.items() if _needed_at(name, bits, state))
        for bits in widths_of(state)
    }
    return {"tensors": sum(item.nbytes for item in info.values()), "tensors_at_bits": at}


def plan_shards(info: Mapping[str, TensorInfo], state: State) -> dict[str, list[str]]:
    """File name -> tensors. All tensors that a width step adds lie together; a shard is about a block large.

    A packed step's files are ``model-<bits>bit-00001-of-00002.safetensors``: loading at fewer bits opens none.
    """
    first = min(widths_of(state), default=None)
    groups: dict[str, list[str]] = {}
    for name in sorted(info):
        step = width_of(name) if name.rpartition(".")[0] in state.packed else None
        label = "model" if first is None else f"model-{max(step or first, first)}bit"
        groups.setdefault(label, []).append(name)
    limit = _shard_limit(info, state)
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


def _shard_limit(info: Mapping[str, TensorInfo], state: State) -> int:
    """A shard is in memory while it is written, so it may be as large as a block, not as large as the model."""
    structure = architecture(state.config)
    blocks: dict[int | None, int] = {}
    for name, item in info.items():
        place = block_of(name, structure)
        blocks[place] = blocks.get(place, 0) + item.nbytes
    largest = max((held for place, held in blocks.items() if place is not None), default=0)
    return min(_LARGEST_SHARD, max(largest, _SMALLEST_SHARD))


def _write_indexes(
    folder: Path, shards: Mapping[str, Iterable[str]], info: Mapping[str, TensorInfo], state: State
) -> None:
    place = {name: file for file, names in shards.items() for name in names}
    if SINGLE not in shards:
        _write_index(folder / index_name(None), place, info)
    for bits in widths_of(state):
        needed = {name: file for name, file in place.items() if _needed_at(name, bits, state)}
        _write_index(folder / index_name(bits), needed, info)


def _write_index(path: Path, place: Mapping[str, str], info: Mapping[str, TensorInfo]) -> None:
    total = sum(info[name].nbytes for name in place)
    write_atomic(
        path, json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}, indent=1)
    )


def _write_config(folder: Path, state: State) -> None:
    state.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if state.packed or state.shapes:
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": format_version(state.packed.values(), state.shapes),
            "bits": None,
            "modules": records(state.packed),
        }
    if state.shapes:
        config["quantization_config"]["pruned"] = {name: asdict(shape) for name, shape in state.shapes.items()}
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def not_quantised(state: State, passes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every linear (and embedding) that stays dense, with the reason."""
    model = StreamedModel(state, torch.device("meta"))
    reasons = {
        name: reason for step in passes for unit in step["units"].values() for name, reason in unit["skipped"].items()
    }
    inside = [name for index in range(len(model.blocks)) for name in model.linears(index)]
    default = "the recipe has no quantising pass"
    outside = "outside the blocks; a quantising pass takes it when include names it" if state.packed else default
    left = {name: reasons.get(name, default) for name in inside if name not in state.packed}
    return left | {name: outside for name in model.outside() if name not in state.packed}


@torch.no_grad()
def probe(folder: Path, running: State, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a written checkpoint makes of a few tokens at every width: loss, and the last position's largest logits.

    Raises:
        CompressError: a loss that is not finite.
    """
    structure = architecture(running.config)
    names = {name: (structure.stored_name(name),) for name in running.source.info()}
    state = State(Checkpoint(folder, names), running.config, running.packed, "", running.shapes)
    model = StreamedModel(state, device)
    widths = widths_of(state)
    ids = torch.tensor(list(tokens)[:64] if len(tokens) > 1 else [0, 1])
    hidden: dict[int, Tensor] = {}
    for bits in widths or [0]:
        set_widths(model.model, state, bits)
        hidden[bits], calls = model.capture(ids)
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            for bits in hidden:
                set_widths(model.model, state, bits)
                hidden[bits] = model.run(block, hidden[bits], calls[index])
    results = {}
    for bits, value in hidden.items():
        set_widths(model.model, state, bits)
        label = str(bits) if bits else "dense"
        results[label] = describe(model.logits(ids, value), ids)
        if not math.isfinite(results[label]["loss"]):
            raise CompressError(
                f"at {label}{' bits' * bool(bits)} the model's loss on a few tokens is not finite; check the dense model's weights."
            )
    return {"tokens": ids.tolist(), "at_bits": results}


def set_widths(model: torch.nn.Module, state: State, bits: int) -> None:
    """Switch every packed module of a streamed model."""
    if bits:
        widths = widths_for(bits, state.packed)
        for name, module in packed_modules(model).items():
            module.bits = widths[name]


def describe(logits: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Loss and the eight largest logits after the last token. ``logits`` is [T, vocabulary]."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:].to(logits.device))
    top = logits[-1].float().topk(min(8, logits.shape[-1]))
    return {
        "loss": loss.item(),
        "top": [[i, v] for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
    }
