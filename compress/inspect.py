"""What is in a checkpoint: modules, bytes at each number of bits, errors, provenance, zeros.

:func:`inspect` reads headers only, and imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from compress.config import check_tensors, read_settings
from compress.manifest import read_manifest
from compress.quant.records import PackedShape, SparseShape, width_of, width_range
from compress.sidecars import inspect_sidecars
from compress.weights import Checkpoint, TensorInfo


def inspect(folder: Path) -> dict[str, Any]:
    """Look at a model folder.

    Returns:
        ``{"folder", "format_version", "files", "bytes", "bytes_at_bits", "parameters", "modules": {name:
        {"shape", "seed_bits", "parent_bits", "bytes_at_bits", "errors", "storage"}}, "dense": {tensor: bytes},
        "prompts": {width: {"tokens", "numbers"}}, "adapter": {"rank", "numbers"}, "not_quantised", "pruned", "blocks", "manifest"}``. Bytes are those of the tensors in the files; dense models have no widths.
        ``storage`` has ``"form"``, ``"sparse"`` or ``"dense"``, and where the manifest knows of pruned weights their
        number ``"zeros"`` and ``"bytes"``, what each form takes.
        ``blocks`` are the sizes of those that are not as large as the config says (``compress.shapes.BlockShape``).
        ``adapter`` is there only where a low-rank adapter lies beside the model, which plain ``from_pretrained`` leaves off.
        ``pruned`` tells whether a pass of the recipe has set weights to zero.

    Raises:
        CompressError: not a model folder, or packed tensors missing or of the wrong shape.
    """
    settings, manifest = read_settings(folder), read_manifest(folder)
    info = Checkpoint(folder).info()
    shapes = settings.shapes() if settings else {}
    if settings is not None:
        check_tensors(folder, settings)
    errors, storage = _noted(manifest or {}, "errors"), _noted(manifest or {}, "storage")
    modules = {
        name: _module(name, shape, info, errors.get(name, {}), storage.get(name, {})) for name, shape in shapes.items()
    }
    passes = (manifest or {}).get("passes", [])
    dense = {name: item.nbytes for name, item in info.items() if name.rpartition(".")[0] not in shapes}
    dense |= {f"{name}.bias": info[f"{name}.bias"].nbytes for name in shapes if f"{name}.bias" in info}
    held = sum(dense.values())
    at = {
        str(bits): held + sum(_at(module["bytes_at_bits"], bits) for module in modules.values())
        for bits in width_range(shapes.values())
    }
    return {
        "folder": str(folder),
        "format_version": settings.format_version if settings else None,
        "files": {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "bytes": sum(item.nbytes for item in info.values()),
        "bytes_at_bits": at,
        "modules": modules,
        "blocks": settings.pruned if settings else {},
        "dense": dense,
        **inspect_sidecars(folder),
        "not_quantised": (manifest or {}).get("not_quantised", {}),
        "pruned": any(_counts_zeros(unit) for step in passes for unit in step["units"].values()),
        "manifest": {key: value for key, value in (manifest or {}).items() if key not in ("files", "passes", "probe")},
    }


def _at(by_width: Mapping[str, int], bits: int) -> int:
    """A module's bytes at a width, brought into its own range."""
    widths = sorted(map(int, by_width))
    return by_width[str(min(max(bits, widths[0]), widths[-1]))]


def _module(
    name: str, shape: PackedShape, info: Mapping[str, TensorInfo], errors: Mapping[str, Any], storage: Mapping[str, Any]
) -> dict[str, Any]:
    held = {tensor: info[f"{name}.{tensor}"].nbytes for tensor in shape.specification()}
    at = {
        str(bits): sum(size for tensor, size in held.items() if (width_of(tensor) or 0) <= bits)
        for bits in shape.widths
    }
    return {
        "shape": [shape.out_features, shape.in_features],
        "seed_bits": shape.seed_bits,
        "parent_bits": shape.parent_bits,
        "bytes_at_bits": at,
        "errors": errors,
        "storage": {**storage, "form": "sparse" if isinstance(shape, SparseShape) else "dense"},
    }


def _noted(manifest: Mapping[str, Any], field: str) -> dict[str, Any]:
    """What the units of all passes say of modules in one field of their records."""
    return {
        name: note
        for step in manifest.get("passes", [])
        for unit in step["units"].values()
        for name, note in unit.get(field, {}).items()
    }


def _counts_zeros(unit: Mapping[str, Any]) -> bool:
    """Tell whether a unit's record is that of a pruning pass: figures with ``zeros`` of every linear in it."""
    linears = unit.get("linears")
    return isinstance(linears, Mapping) and any(
        isinstance(found, Mapping) and "zeros" in found for found in linears.values()
    )


def sparsity(folder: Path) -> dict[str, Any]:
    """Count exact zeros in the linears inside the blocks, packed ones at their parent width.

    One block is in memory at a time.

    Returns:
        ``{"zeros", "parameters", "sparsity", "blocks": {name: the same}, "linears": {name: the same}}``.

    Raises:
        CompressError: not a model folder, or an undeclared architecture.
    """
    import torch

    from compress.hf import packed_modules
    from compress.source import checkpoint_state
    from compress.streaming import StreamedModel
    from compress.structure import block_prefix, linears_of

    model = StreamedModel(checkpoint_state(folder), torch.device("cpu"))
    linears: dict[str, dict[str, float]] = {}
    blocks: dict[str, dict[str, float]] = {}
    for index in range(len(model.blocks)):
        prefix = block_prefix(model.structure, index)
        with model.block(index) as block:
            weights = ((name, linear.weight) for name, linear in linears_of(block, prefix).items())
            unpacked = ((f"{prefix}.{name}", module.dense()) for name, module in packed_modules(block).items())
            inside = {
                name: _counted(int((weight == 0).sum()), weight.numel())
                for name, weight in chain(weights, unpacked)  # a packed one's only while it is looked at
            }
        linears |= inside
        blocks[prefix] = _total(inside)
    return {**_total(linears), "blocks": blocks, "linears": linears}


def _counted(zeros: float, parameters: float) -> dict[str, float]:
    return {"zeros": zeros, "parameters": parameters, "sparsity": zeros / parameters if parameters else 0.0}


def _total(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return _counted(sum(p["zeros"] for p in parts.values()), sum(p["parameters"] for p in parts.values()))
