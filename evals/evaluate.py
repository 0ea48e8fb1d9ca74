"""Measure a text (``compress eval --text``): one load, every width asked for, one documented object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import compress
from compress.adapters import virtual_tokens
from compress.calibration import read_documents
from compress.errors import CompressError, did_you_mean
from compress.evals.perplexity import Text, context_length, prepare, score
from compress.evals.store import Key, Results, identity, prompt_key
from compress.hf import packed_modules
from compress.loading import bits_for, load_tokenizer
from compress.manifest import read_manifest
from compress.passes import Report
from compress.quant.records import width_range
from compress.sidecars import Choice
from compress.texts import HELDOUT, fingerprint, read_modules
from compress.weights import sha256_of

BUILTIN = "builtin"


@dataclass(frozen=True)
class Protocol:
    """Say how a text is cut and scored.

    Attributes:
        separator: divides the text into documents; without it the file is one.
        limit: number of documents, from the first; all if None.
        min_characters: documents of this length or less are passed over.
        length: tokens in a window; the model's context (at most 2048) if None.
        stride: tokens a window advances by; half of ``length`` if None.
        truncate: score only the first window of each document.
        join: put between the documents, which become one text.
        characters: of the joined text, from the first; all if None.
        disjoint: windows side by side, each scored on its own but for its first token; the rest of the text is left out.
    """

    separator: str | None = None
    limit: int | None = None
    min_characters: int = 0
    length: int | None = None
    stride: int | None = None
    truncate: bool = False
    join: str | None = None
    characters: int | None = None
    disjoint: bool = False


PRESETS: Mapping[str, tuple[Protocol, str]] = {
    "2048": (
        Protocol(join="\n\n", length=2048, disjoint=True),
        "GPTQ, SparseGPT, Wanda, OWL: the documents as one text, windows of 2048 tokens side by side",
    ),
    "llm-pruner": (
        Protocol(join="\n\n", length=128, disjoint=True),
        "LLM-Pruner, MINI-LLM: the same in windows of 128 tokens",
    ),
    "any-precision": (
        Protocol(join="\n\n", length=2048, disjoint=True),
        "Any-Precision LLM on WikiText-2 (the same as 2048)",
    ),
    "any-precision-c4": (
        Protocol(join=" ", limit=1100, characters=2_088_528, length=2048, disjoint=True),
        "Any-Precision LLM on C4: the first 1100 documents of the validation split, joined by spaces, 2,088,528 characters",
    ),
    "any-precision-ptb": (
        Protocol(join=" ", length=2048, disjoint=True),
        "Any-Precision LLM on PTB: sentences joined by spaces; write <unk> as < u n k > in the file, as there",
    ),
    "compress-then-prompt": (
        Protocol(join="\n\n", length=1024, disjoint=True),
        "Compress, then Prompt: windows of 1024 tokens; averaged over text tokens, which its code did not",
    ),
}
"""Protocols of papers by name, and what they are. The text is given as a file, or as documents by ``separator`` or JSON lines."""


def protocol_of(preset: str | None, **changes: Any) -> Protocol:
    """Return a protocol by name, with changes; those that are None or False change nothing.

    Raises:
        CompressError: there is no preset of that name.
    """
    if preset is not None and preset not in PRESETS:
        raise CompressError(f"--protocol: there is no {preset!r}. {did_you_mean(preset, PRESETS)}")
    start = PRESETS[preset][0] if preset else Protocol()
    return replace(
        start, **{name: value for name, value in changes.items() if value is not None and value is not False}
    )


def documents_of(source: str, protocol: Protocol) -> tuple[list[str], str]:
    """Return the documents of a file (or of the built-in held-out text), and the digest of what was read."""
    if source == BUILTIN:
        texts = read_modules(HELDOUT)
        documents, digest = list(texts.values()), " ".join(fingerprint(texts).values())
    else:
        documents, digest = read_documents(Path(source), protocol.separator), sha256_of(Path(source))
    kept = [text for text in documents if len(text) > protocol.min_characters][: protocol.limit]
    if protocol.join is not None:
        kept = [protocol.join.join(kept)[: protocol.characters]]
    return kept, digest


def windows(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> Text:
    """Cut documents as a protocol says, whose ``length`` is given."""
    assert protocol.length is not None
    return prepare(documents, tokenizer, protocol.length, protocol.stride, protocol.truncate, protocol.disjoint)


def settings_of(digest: str, protocol: Protocol, dtype: torch.dtype) -> dict[str, Any]:
    """Return what else decides the figures of a text: its content, how it is cut (with the length in use), the arithmetic."""
    return {"sha256": digest, "protocol": asdict(protocol), "dtype": str(dtype).removeprefix("torch.")}


def widths_to_measure(model: PreTrainedModel, asked: Sequence[int | float] | None) -> list[int | float | None]:
    """Return the widths to measure, largest first; ``[None]`` for a dense model.

    Raises:
        CompressError: widths asked of a dense model, or one that it does not have.
    """
    modules = packed_modules(model).values()
    if not modules:
        if asked:
            raise CompressError("--bits: this is a dense model, it has no widths to choose from.")
        return [None]
    stored = width_range(module.shape for module in modules)
    for width in asked or ():
        if not stored[0] <= width <= stored[-1]:
            raise CompressError(
                f"--bits: width {width} is not available; this model can be read at {stored[0]} to {stored[-1]} bits."
            )
    return [*sorted(asked or stored, reverse=True)]


def evaluate_text(
    folder: str,
    source: str,
    bits: Sequence[int | float] | None = None,
    protocol: Protocol | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    report: Report | None = None,
    prompt: bool | str | Path = False,
    store: Results | None = None,
    adapter: Choice = None,
) -> dict[str, Any]:
    """Measure loss, perplexity and bits per byte at several widths, from one load.

    Args:
        folder: checkpoint, or a dense model.
        source: text file, or ``builtin`` for the held-out modules of the standard library.
        bits: widths, or mean widths such as 3.5 (:func:`compress.load`); all there are if None.
        protocol: how the text is cut.
        dtype: to compute in.
        device: to compute on.
        report: called with (width, windows done, windows in all).
        prompt: put the checkpoint's own soft prompts (True), or those of a folder, before every window. Windows are
            shorter by as much unless ``protocol.length`` says otherwise: give it to compare with and without.
        store: widths that it has are not measured again; new ones are added.
        adapter: as for :func:`compress.load`.

    Returns:
        ``{"model", "text": {"source", "sha256", "documents"}, "protocol", "bits": {"4": {"loss",
        "perplexity", "bits_per_byte", "tokens", "bytes"}}}``, and ``"prompt"`` and ``"adapter"`` (its digest) where one is used; a mean width's key is ``"3.5"``; a dense model's only key is ``"dense"``.

    Raises:
        CompressError: the text is the checkpoint's own calibration text or what its prompt was trained on, nothing in it
            can be scored, or a window and the prompt are longer than the context.
    """
    return open_text(folder, source, bits, protocol, dtype, device, report, prompt, store, adapter).evaluate()


@dataclass(frozen=True)
class OpenText:
    """Hold a loaded model and a text, ready to be measured at several widths.

    Attributes:
        folder: of the model.
        source: the text's name.
        documents: of the text.
        settings: :func:`settings_of` it, and digests of prompts and adapter.
        prompt: name of what is unusual about the model, for :class:`compress.evals.store.Key`.
        model: with its prompt and adapter.
        tokenizer: of the model.
        front: the prompt as given to :func:`evaluate_text`.
        widths: label -> what :func:`compress.set_bits` takes; None for the one of a dense model.
        protocol: with the length in use.
        store: for results.
        report: called with (what, windows done, windows in all).
    """

    folder: str
    source: str
    documents: list[str]
    settings: dict[str, Any]
    prompt: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    front: bool | str | Path
    widths: dict[str, Any]
    protocol: Protocol
    store: Results
    report: Report | None

    def evaluate(self) -> dict[str, Any]:
        """Measure the text at every width, as :func:`evaluate_text` returns it."""
        text = self.text(self.documents)
        key = Key("text", self.source, identity(self.folder), "", self.prompt, self.settings)
        results = {}
        for width, value in self.widths.items():
            row = self.store.find(replace(key, width=width))
            if row is None:
                if value is not None:
                    compress.set_bits(self.model, value)
                found = score(self.model, text, report=self.watch(width))
                row = self.store.add(replace(key, width=width), found.json())
            results[width] = row["metrics"]
        protocol, virtual = self.protocol, virtual_tokens(self.model)
        place = str(self.folder if self.front is True else self.front)
        cut = {"length": protocol.length, "stride": _stride(protocol), "truncate": protocol.truncate}
        digest = self.settings["sha256"]
        return {
            "model": self.folder,
            "text": {"source": self.source, "sha256": digest, "documents": len(self.documents)},
            "protocol": {"separator": protocol.separator, "min_characters": protocol.min_characters, **cut},
            **({"prompt": {"from": place, "tokens": virtual}} if virtual else {}),
            **({"adapter": self.settings["adapter"]} if "adapter" in self.settings else {}),
            "bits": results,
        }

    def text(self, documents: Sequence[str]) -> Text:
        """Cut documents into windows."""
        return windows(documents, self.tokenizer, self.protocol)

    def watch(self, what: str) -> Callable[[int, int], None] | None:
        """Return the report of one part of the work."""
        report = self.report
        return None if report is None else lambda done, total: report(what, done, total)


def open_text(
    folder: str,
    source: str,
    bits: Sequence[int | float] | None = None,
    protocol: Protocol | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    report: Report | None = None,
    prompt: bool | str | Path = False,
    store: Results | None = None,
    adapter: Choice = None,
) -> OpenText:
    """Read a text and load a model to measure on it; arguments and errors as of :func:`evaluate_text`."""
    protocol = protocol or Protocol()
    documents, digest = documents_of(source, protocol)
    refuse_calibration_text(folder, digest)
    for other in (prompt, adapter):
        if isinstance(other, str | Path):
            for place in (Path(other), *Path(other).parents[:2]):  # of a checkpoint, or within one
                refuse_calibration_text(str(place), digest)
    model, widths = load_widths(folder, bits, dtype=dtype, device_map=device, prompt=prompt, adapter=adapter)
    protocol = replace(protocol, length=window_length(model, protocol.length))
    name, settings = prompt_key(folder, prompt, settings_of(digest, protocol, dtype), adapter)
    tokenizer, store = load_tokenizer(folder), store or Results(None)
    return OpenText(
        folder, source, documents, settings, name, model, tokenizer, prompt, widths, protocol, store, report
    )


def load_widths(
    folder: str, bits: Sequence[int | float] | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model once, for several widths.

    Args:
        folder: checkpoint, or a dense model.
        bits: widths, or mean widths such as 3.5; all there are if None.
        **options: for :func:`compress.load`.

    Returns:
        The model, and label -> what :func:`compress.set_bits` takes, widest first; ``{"dense": None}`` for a dense model.
    """
    chosen = {str(width): bits_for(folder, width) for width in bits or ()}  # 4 and 4.0 are not the same
    whole = [width for width in bits or () if isinstance(width, int)]
    model = compress.load(folder, bits=max(whole) if whole and len(whole) == len(chosen) else None, **options)
    widths = widths_to_measure(model, bits)
    return model, {"dense" if w is None else str(w): chosen.get(str(w)) or w for w in widths}


def window_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Return the tokens of text in a window: what is wanted, or the context, at most 2048, less what a prompt takes.

    Raises:
        CompressError: more than there is room for.
    """
    longest = context_length(model, cap=1 << 30)
    if wanted is not None and wanted > longest:
        room = (
            f"beside the soft prompt there is room for {longest}"
            if virtual_tokens(model)
            else f"the context holds {longest}"
        )
        raise CompressError(f"windows of {wanted} tokens: {room}; give --length.")
    return min(longest, context_length(model)) if wanted is None else wanted


def _stride(protocol: Protocol) -> int:
    length = protocol.length or 2
    return length if protocol.disjoint else protocol.stride or max(1, length // 2)


def refuse_calibration_text(folder: str, digest: str) -> None:
    """Refuse a text that shaped the model, as it says nothing about it.

    Raises:
        CompressError: the manifest names this very text as one the model was calibrated or trained on.
    """
    manifest = read_manifest(Path(folder)) or {}
    texts = [manifest.get("calibration"), *(step.get("text") for step in manifest.get("passes", []))]
    if any(text and text.get("sha256") == digest for text in texts):
        raise CompressError("this is a text the checkpoint was calibrated or trained on; measure on another.")
