"""Read the manifest, a checkpoint's own account of itself, and check the files against it (no torch)."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.config import check_tensors, read_settings
from compress.errors import CompressError
from compress.quant.records import bits_range
from compress.sidecars import find_adapter, stored_prompts
from compress.weights import refuse_elsewhere, sha256_of

MANIFEST = "compression.json"
_KEYS = frozenset({"compress_version", "files", "not_quantised", "passes", "probe", "recipe", "sizes", "versions"})
_TOLERANCE = 1e-3  # of the largest logit: another machine or transformers release sums in another order


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest, and refuse a damaged one; return None where there is none (as after ``save_pretrained``)."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{path}: is not JSON ({error}); the checkpoint is damaged.") from error
    missing = _KEYS - found.keys() if isinstance(found, dict) else _KEYS
    if missing:
        raise CompressError(f"{path}: has no {min(missing)!r}, as every manifest has; the checkpoint is damaged.")
    refuse_elsewhere(path, found["files"])
    return found  # type: ignore[no-any-return]


def noted(manifest: Mapping[str, Any], field: str) -> Iterator[tuple[str, Any]]:
    """Yield (module, note) for what units of all passes, in order, say in one field of their records that is a mapping."""
    for unit in (unit for step in manifest.get("passes", []) for unit in step["units"].values()):
        found = unit.get(field)
        yield from found.items() if isinstance(found, Mapping) else ()


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which a file is missing or not what was written."""
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CompressError(f"{path}: is missing; fetch or write the checkpoint again.")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise CompressError(f"{path}: has {size} bytes instead of {recorded['bytes']}; fetch or write it again.")
        if sha256_of(path) != recorded["sha256"]:
            raise CompressError(f"{path}: its content has changed (SHA-256 differs from the manifest); fetch it again.")


def verify(folder: Path) -> list[str]:
    """Check digests, tensors, and what a fresh process computes; return a line per check, or refuse the first that fails."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: has no {MANIFEST}, so there is nothing to verify it against.")
    settings = read_settings(folder)
    check_files(folder, manifest)
    passed = [f"{len(manifest['files'])} files have their recorded size and SHA-256"]
    if settings is not None and settings.modules:
        count = check_tensors(folder, settings)
        passed.append(f"{count} tensors of {len(settings.modules)} packed modules have their recorded shape and type")
    if prompts := stored_prompts(folder):
        passed.append(f"{len(prompts)} soft prompt{'s' * (len(prompts) > 1)} can be read")
    if find_adapter(folder):
        passed.append("its adapter can be read")
    expected = manifest["probe"]["at_bits"]
    for bits, found in _probe_in_fresh_process(folder, manifest["probe"]).items():
        _compare(bits, expected[bits], found)
    passed.append(f"a fresh process loads it and computes the recorded logits at {', '.join(expected)}")
    return passed


def _probe_in_fresh_process(folder: Path, probe: dict[str, Any]) -> dict[str, Any]:
    code = "import sys; from compress.manifest import answer_probe; answer_probe(sys.argv[1])"
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder)], input=json.dumps(probe["tokens"]), capture_output=True, text=True
    )
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1] if process.stderr.strip() else "no message"
        raise CompressError(f"{folder}: a fresh process cannot load it: {last}")
    return json.loads(process.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def answer_probe(folder: str) -> None:
    """Read tokens from standard input, in the fresh process, and print what the loaded model makes of them."""
    import torch

    import compress
    from compress.writer import describe

    tokens = torch.tensor(json.load(sys.stdin))
    model = compress.load(folder, dtype=torch.float32, adapter=False)  # the probe is of the model alone
    settings = read_settings(Path(folder))
    results = {}
    with torch.no_grad():
        for bits in bits_range(settings.shapes().values() if settings else ()) or [0]:
            if bits:
                compress.set_bits(model, bits)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            results[str(bits or "dense")] = describe(logits, tokens)
    print(json.dumps(results))


def _compare(bits: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    scale = max(abs(value) for _, value in expected["top"])
    values = dict(map(tuple, found["top"]))
    apart = [abs(value - values.get(token, math.nan)) for token, value in expected["top"][: len(values) // 2]]
    if not all(difference <= _TOLERANCE * scale for difference in [abs(expected["loss"] - found["loss"]), *apart]):
        raise CompressError(
            f"at {bits} bits a fresh process computes other logits (loss {found['loss']:.6f}) than were recorded when it "
            f"was written (loss {expected['loss']:.6f}); the checkpoint or the installation is damaged."
        )
