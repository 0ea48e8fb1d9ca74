"""Measure a text (``compress eval --text``) at several numbers of bits from one load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import compress
from compress.adapters import virtual_tokens
from compress.calibration import read_documents
from compress.defaults import usual_defaults
from compress.errors import CompressError, did_you_mean
from compress.evals.kv import CachedLosses, KVWanted, refuse_misfits
from compress.evals.perplexity import Text, context_length, prepare, score
from compress.evals.store import Key, Results, identity, prompt_key
from compress.hf import packed_modules
from compress.hub import place_of
from compress.kv_serving import make_caches
from compress.kv_settings import KVBits, kv_label
from compress.loading import bits_for, load_tokenizer
from compress.manifest import read_manifest
from compress.passes import Progress
from compress.quant.records import bits_range
from compress.sidecars import Choice
from compress.texts import HELDOUT, fingerprint, read_modules
from compress.tokens import count_special, set_generation
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
        special_tokens: read special tokens that the text spells as such, and not as text.
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
    special_tokens: bool = False

    def cut(self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Text:
        """Cut documents into windows; ``length`` is given."""
        assert self.length is not None
        return prepare(
            documents, tokenizer, self.length, self.stride, self.truncate, self.disjoint, self.special_tokens
        )


_JOINED = Protocol(join="\n\n", length=2048, disjoint=True)  # windows side by side in the documents as one text
PRESETS: Mapping[str, Protocol] = {
    "2048": _JOINED,  # GPTQ, SparseGPT, Wanda, OWL
    "llm-pruner": replace(_JOINED, length=128),  # MINI-LLM too
    "any-precision": _JOINED,  # on WikiText-2
    # 1100 documents of the validation split
    "any-precision-c4": replace(_JOINED, join=" ", limit=1100, characters=2_088_528),
    "any-precision-ptb": replace(_JOINED, join=" "),  # the file has < u n k > for <unk>, as there
    "compress-then-prompt": replace(_JOINED, length=1024),  # averaged over text tokens, which its code did not
}
"""Protocols of papers by name. The text is given as a file, or as documents by ``separator`` or JSON lines."""


def protocol_of(preset: str | None, **changes: Any) -> Protocol:
    """Return a protocol by name, with changes; those that are None or False change nothing."""
    if preset is not None and preset not in PRESETS:
        raise CompressError(f"--protocol: there is no {preset!r}. {did_you_mean(preset, PRESETS)}")
    start = PRESETS[preset] if preset else Protocol()
    return replace(start, **{key: value for key, value in changes.items() if value not in (None, False)})


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


def bits_to_measure(model: PreTrainedModel, asked: Sequence[int | float] | None) -> list[int | float | None]:
    """Return the numbers of bits to measure at, most first; ``[None]`` for a dense model."""
    modules = packed_modules(model).values()
    if not modules:
        if asked:
            raise CompressError("--bits: this is a dense model, it has no bits to choose from.")
        return [None]
    stored = bits_range(module.shape for module in modules)
    if missing := [bits for bits in asked or () if not stored[0] <= bits <= stored[-1]]:
        raise CompressError(
            f"--bits: {missing[0]} bits are not available; this model can be read at {stored[0]} to {stored[-1]} bits."
        )
    return [*sorted(asked or stored, reverse=True)]


class OpenModel:
    """Load a model once, to measure it at several numbers of bits.

    Args:
        folder: checkpoint, or a dense model.
        bits: numbers of bits, or mean numbers such as 3.5 (:func:`compress.load`); all there are if None.
        dtype: to compute in.
        device: to compute on.
        prompt: put the checkpoint's own soft prompts (True), or those of a folder, before every text.
        adapter: as for :func:`compress.load`.
        store: what it has is not measured again; what is measured is added.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        folder: str,
        bits: Sequence[int | float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        prompt: bool | str | Path = False,
        adapter: Choice = None,
        store: Results | None = None,
        progress: Progress | None = None,
    ) -> None:
        folder = place_of(folder)
        self.folder, self.prompt, self.progress = folder, prompt, progress
        self.store, self.dtype = store or Results(None), str(dtype).removeprefix("torch.")
        self.model, self.all_bits = load_bits(
            folder, bits, dtype=dtype, device_map=device, prompt=prompt, adapter=adapter
        )
        self.tokenizer: Any = load_tokenizer(folder)
        set_generation(self.model, self.tokenizer)
        self._name, self.digests = prompt_key(folder, prompt, {}, adapter)

    def key(self, kind: str, name: str, settings: Mapping[str, Any]) -> Key:
        """Return the key of a measurement, but for the number of bits."""
        return Key(kind, name, identity(self.folder), "", self._name, {**settings, **self.digests})

    @usual_defaults()
    def measure(self, key: Key, work: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return number of bits -> row of the store, after measuring what is missing: ``work`` gives the parts of a row."""
        rows = {}
        for label, bits in self.all_bits.items():
            here = replace(key, width=label)
            row = self.store.find(here)
            if row is None:
                if bits is not None:
                    compress.set_bits(self.model, bits)
                row = self.store.add(here, **work(label))
            rows[label] = row
        return rows

    def watch(self, what: str) -> Callable[[int, int], None] | None:
        """Return the progress of one part of the work."""
        return None if self.progress is None else partial(self.progress, what)


class OpenText(OpenModel):
    """Read a text and load a model to measure on it; arguments and errors as of :func:`evaluate_text`."""

    def __init__(
        self,
        folder: str,
        source: str,
        bits: Sequence[int | float] | None = None,
        protocol: Protocol | None = None,
        kv: KVWanted | None = None,
        **options: Any,
    ) -> None:
        protocol, self.kv = protocol or Protocol(), kv or KVWanted()
        refuse_misfits(folder, self.kv)
        self.source, (self.documents, digest) = source, documents_of(source, protocol)
        places = [Path(folder)]
        for other in (options.get("prompt"), options.get("adapter")):
            if isinstance(other, str | Path):
                places += [Path(other), *Path(other).parents[:2]]  # of a checkpoint, or within one
        for manifest in (read_manifest(place) or {} for place in places):
            texts = [manifest.get("calibration"), *(step.get("text") for step in manifest.get("passes", []))]
            if any(text and text.get("sha256") == digest for text in texts):
                raise CompressError("this is a text the checkpoint was calibrated or trained on; measure on another.")
        super().__init__(folder, bits, **options)
        self.protocol = replace(protocol, length=window_length(self.model, protocol.length))
        self.caches = [(bits, make_caches(self.model, bits, self.kv.settings)) for bits in self.kv.bits]
        read = {"bos": self.tokenizer.bos_token, "special_tokens": count_special(self.tokenizer, self.documents)}
        self.settings = {"sha256": digest, "protocol": asdict(self.protocol), "dtype": self.dtype, **read}

    def evaluate(self) -> dict[str, Any]:
        """Measure the text at all numbers of bits, as :func:`evaluate_text` returns it."""
        protocol, virtual = self.protocol, virtual_tokens(self.model)
        text = protocol.cut(self.documents, self.tokenizer)
        rows = self.measure(
            self.key("text", self.source, self.settings),
            lambda label: {"metrics": score(self.model, text, progress=self.watch(label)).json()},
        )
        length = protocol.length or 2
        stride = length if protocol.disjoint else protocol.stride or max(1, length // 2)
        cut = {"length": length, "stride": stride, "truncate": protocol.truncate}
        place = str(self.folder if self.prompt is True else self.prompt)
        return {
            "model": self.folder,
            "text": {
                "source": self.source,
                "documents": len(self.documents),
                **{key: self.settings[key] for key in ("sha256", "special_tokens")},
            },
            "protocol": {
                "separator": protocol.separator,
                "min_characters": protocol.min_characters,
                **cut,
                "bos": self.settings["bos"],
                "special_tokens_read_as": "special tokens" if protocol.special_tokens else "text",
            },
            **({"prompt": {"from": place, "tokens": virtual}} if virtual else {}),
            **({"adapter": self.digests["adapter"]} if "adapter" in self.digests else {}),
            "bits": {label: row["metrics"] for label, row in rows.items()},
            **({"kv": self._cached(text)} if self.caches else {}),
        }

    def _cached(self, text: Text) -> dict[str, Any]:
        """Measure with each packed cache in the loop: its label -> number of bits of the weights -> metrics."""
        found = {}
        for bits, make in self.caches:

            def work(label: str, make: Any = make, bits: KVBits = bits) -> dict[str, Any]:
                losses = CachedLosses(make)
                metrics = score(self.model, text, 1, self.watch(f"{label}, cache {kv_label(bits)}"), losses).json()
                return {"metrics": {**metrics, "kv_bytes": losses.bytes, "kv_tokens": losses.tokens}}

            key = self.key("kv", self.source, {**self.settings, "kv": self.kv.key(bits)})
            found[kv_label(bits)] = {label: row["metrics"] for label, row in self.measure(key, work).items()}
        return found


def evaluate_text(
    folder: str,
    source: str,
    bits: Sequence[int | float] | None = None,
    protocol: Protocol | None = None,
    kv: KVWanted | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure loss, perplexity and bits per byte at several numbers of bits, from one load.

    Args:
        folder: checkpoint, or a dense model.
        source: text file, or ``builtin`` for the held-out modules of the standard library.
        bits: numbers of bits, or mean numbers such as 3.5 (:func:`compress.load`); all there are if None.
        protocol: how the text is cut. A soft prompt makes windows shorter by its tokens unless ``protocol.length`` is
            given: give it to compare with and without.
        kv: packed caches to measure with too, a block of tokens after the other.
        **options: ``dtype``, ``device``, ``prompt``, ``adapter``, ``store`` and ``progress`` of :class:`OpenModel`.

    Returns:
        ``{"model", "text": {"source", "sha256", "documents", "special_tokens"}, "protocol", "bits": {"4": {"loss", "perplexity",
        "bits_per_byte", "tokens", "bytes"}}}``, and ``"prompt"`` and ``"adapter"`` (its digest) where one is used; a mean
        number's key is ``"3.5"``; a dense model's only key is ``"dense"``. With packed caches also ``"kv": {"4": {"dense": {…,
        "kv_bytes", "kv_tokens"}}}``: by bits of the cache, then of the weights, with the bytes that the cache took and the
        tokens it held when it was largest.

    Raises:
        CompressError: the text is the checkpoint's own calibration text or what its prompt was trained on, nothing in it
            can be scored, or a window and the prompt are longer than the context.
    """
    return OpenText(folder, source, bits, protocol, kv, **options).evaluate()


def load_bits(
    folder: str, bits: Sequence[int | float] | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model once, for several numbers of bits, or mean numbers such as 3.5; for all there are if None.

    Return it and label -> what :func:`compress.set_bits` takes, most bits first; ``{"dense": None}`` for a dense model.
    """
    chosen = {str(number): bits_for(folder, number) for number in bits or ()}  # 4 and 4.0 are not the same
    whole = [number for number in bits or () if isinstance(number, int)]
    model = compress.load(folder, bits=max(whole) if whole and len(whole) == len(chosen) else None, **options)
    found = bits_to_measure(model, bits)
    return model, {"dense" if n is None else str(n): chosen.get(str(n)) or n for n in found}


def window_length(model: PreTrainedModel, wanted: int | None = None) -> int:
    """Return the tokens of text in a window: what is wanted, or the context, at most 2048, less what a prompt takes."""
    longest = context_length(model, cap=1 << 30)
    if wanted is not None and wanted > longest:
        prompted = bool(virtual_tokens(model))
        room = f"{'beside the soft prompt there is room for' if prompted else 'the context holds'} {longest}"
        raise CompressError(f"windows of {wanted} tokens: {room}; give --length.")
    return context_length(model) if wanted is None else wanted
