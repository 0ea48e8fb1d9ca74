"""What is in a checkpoint: modules, bytes by width, errors, provenance. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.hf import CompressConfig, replace_packed
from compress.loading import check_tensors
from compress.manifest import read_settings
from compress.pipeline import read_config
from compress.quant.format import PackedShape, SparseShape, bits_range, width_of
from compress.shapes import replace_shapes
from compress.sidecars import inspect_sidecars
from compress.streaming import State, empty_model, tensor_names
from compress.structure import architecture
from compress.weights import Checkpoint, TensorInfo, read_manifest
from compress.workspace import digest


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
        for bits in bits_range(shapes.values())
    }
    return {
        "folder": str(folder),
        "format_version": settings.format_version if isinstance(settings, CompressConfig) else None,
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
        "pruned": any(unit.get("linears") for step in passes for unit in step["units"].values()),
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


def checkpoint_state(folder: Path) -> State:
    """A checkpoint, or a dense model, as passes see it: nothing is read but headers.

    Raises:
        CompressError: not a model folder, or an undeclared architecture.
    """
    settings, config = read_settings(folder), read_config(folder)
    if settings is not None:
        del config.quantization_config  # the model is built dense and then replaced
    model, rename = empty_model(config), architecture(config).stored_name
    running = {rename(name): name for name, _ in model.named_modules()}
    packed = {running.get(name, name): shape for name, shape in (settings.shapes() if settings else {}).items()}
    shapes = settings.block_shapes() if settings else {}
    replace_shapes(model, shapes)
    replace_packed(model, packed)
    return State(Checkpoint(folder, tensor_names(model)), config, packed, digest(str(folder)), shapes)
