"""Look at what is in a checkpoint: modules, bytes, errors, provenance (from headers, without torch), and zeros."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from compress.config import check_tensors, read_settings
from compress.manifest import noted, read_manifest
from compress.quant.records import (
    PackedShape,
    SparseShape,
    StackedShape,
    bits_range,
    expert_name,
    model_bytes,
    packed_bytes,
    unstacked,
)
from compress.sidecars import inspect_sidecars
from compress.weights import Checkpoint


def inspect(folder: Path) -> dict[str, Any]:
    """Look at a model folder.

    Returns:
        ``{"folder", "format_version", "files", "bytes", "bytes_at_bits", "divergence_at_bits", "parameters", "modules": {name:
        {"shape", "seed_bits", "parent_bits", "bytes_at_bits", "errors", "storage"}}, "dense": {tensor: bytes},
        "prompts": {bits: {"tokens", "numbers"}}, "adapter": {"rank", "numbers"}, "not_quantised", "pruned", "blocks",
        "manifest"}``. Bytes are those of the tensors in the files; dense models have no ``bytes_at_bits``.
        ``divergence_at_bits`` has, where it was measured, the sum of all matrices' (:mod:`compress.divergence`), in nats per token.
        ``errors`` of a stack of experts are means over them. ``storage`` has ``"form"``, ``"sparse"`` or ``"dense"``, and where the manifest knows of pruned weights their
        number ``"zeros"`` and ``"bytes"``, what each form takes.
        ``blocks`` are the sizes of those that are not as large as the config says (``compress.config.BlockShape``).
        ``adapter`` is there only where a low-rank adapter lies beside the model, which plain ``from_pretrained`` leaves off.
        ``pruned`` tells whether a pass of the recipe has set weights to zero.

    Raises:
        CompressError: not a model folder, or packed tensors missing or of the wrong shape.
    """
    settings, manifest = read_settings(folder), read_manifest(folder) or {}
    info = Checkpoint(folder).info()
    shapes = settings.shapes() if settings else {}
    if settings is not None:
        check_tensors(folder, settings)
    errors, storage = dict(noted(manifest, "errors")), dict(noted(manifest, "storage"))
    modules = {
        name: {
            "shape": [shape.out_features, shape.in_features],
            "seed_bits": shape.seed_bits,
            "parent_bits": shape.parent_bits,
            "bytes_at_bits": {str(bits): packed_bytes(shape, bits) for bits in shape.all_bits},
            "errors": _errors(name, shape, errors),
            "storage": {**storage.get(name, {}), "form": "sparse" if isinstance(shape, SparseShape) else "dense"},
        }
        for name, shape in shapes.items()
    }
    dense = {name: item.nbytes for name, item in info.items() if name.rpartition(".")[0] not in shapes}
    dense |= {f"{name}.bias": info[f"{name}.bias"].nbytes for name in shapes if f"{name}.bias" in info}
    held = sum(dense.values())
    at = {str(bits): held + model_bytes(shapes.values(), bits) for bits in bits_range(shapes.values())}
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
        "divergence_at_bits": _divergences(shapes, errors),
        "modules": modules,
        "blocks": settings.pruned if settings else {},
        "dense": dense,
        **inspect_sidecars(folder),
        "not_quantised": manifest.get("not_quantised", {}),
        "pruned": any(isinstance(note, Mapping) and "zeros" in note for _, note in noted(manifest, "linears")),
        "manifest": {key: value for key, value in manifest.items() if key not in ("files", "passes", "probe")},
    }


def _divergences(shapes: Mapping[str, PackedShape], errors: Mapping[str, Any]) -> dict[str, float]:
    """Add up the divergence that each matrix's error makes, by the model's bits; nothing where it was not measured."""
    every, found = unstacked(shapes), {}
    for bits in bits_range(shapes.values()):
        told = [errors.get(name, {}).get(str(shape.at(bits)), {}).get("divergence") for name, shape in every.items()]
        if None not in told:
            found[str(bits)] = sum(told)
    return found


def _errors(name: str, shape: PackedShape, errors: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return what the manifest says of a matrix, by bits and kind of error; of a stack the means over its experts."""
    if not isinstance(shape, StackedShape):
        return errors.get(name, {})  # type: ignore[no-any-return]
    found = [errors.get(expert_name(name, place), {}) for place in range(shape.experts)]
    return {
        bits: {kind: sum(one[bits][kind] for one in found) / len(found) for kind in kinds}
        for bits, kinds in found[0].items()
        if all(bits in one and one[bits].keys() >= kinds.keys() for one in found)
    }


def sparsity(folder: Path) -> dict[str, Any]:
    """Count exact zeros in the linears inside the blocks, packed ones at all of their bits, one block at a time.

    Returns:
        ``{"zeros", "parameters", "sparsity", "blocks": {name: the same}, "linears": {name: the same}}``.
    """
    import torch

    from compress.hf import packed_modules
    from compress.source import checkpoint_state
    from compress.streaming import StreamedModel
    from compress.structure import block_prefix, linears_of

    model = StreamedModel(checkpoint_state(folder), torch.device("cpu"))
    blocks: dict[str, dict[str, tuple[int, int]]] = {}  # zeros and all weights, by linear
    for index in range(len(model.blocks)):
        prefix = block_prefix(model.structure, index)
        with model.block(index) as block:
            weights = ((name, linear.weight) for name, linear in linears_of(block, prefix).items())
            unpacked = ((f"{prefix}.{name}", module.dense()) for name, module in packed_modules(block).items())
            blocks[prefix] = {
                name: (int((weight == 0).sum()), weight.numel())
                for name, weight in chain(weights, unpacked)  # a packed one's only while it is looked at
            }
    linears = {name: counts for inside in blocks.values() for name, counts in inside.items()}
    return {
        **_total(linears.values()),
        "blocks": {name: _total(inside.values()) for name, inside in blocks.items()},
        "linears": {name: _total([counts]) for name, counts in linears.items()},
    }


def _total(counts: Iterable[tuple[int, int]]) -> dict[str, float]:
    zeros, parameters = (sum(part) for part in zip(*counts, strict=True))
    return {"zeros": zeros, "parameters": parameters, "sparsity": zeros / parameters}
