"""Draw calibration samples from text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.errors import CompressError
from compress.settings import Calibration
from compress.texts import CALIBRATION, fingerprint, read_modules
from compress.weights import sha256_of
from compress.workspace import digest


@dataclass(frozen=True)
class Samples:
    """Hold token sequences, int64 [T] each with BOS in front where the tokenizer has one, and what the manifest says of them."""

    tokens: tuple[Tensor, ...]
    source: dict[str, object]

    @property
    def key(self) -> str:
        """Return a digest of the tokens."""
        return digest([sample.tolist() for sample in self.tokens])

    def first(self, count: int | None) -> Samples:
        """Return the first few of them; all for None."""
        return Samples(self.tokens[:count], self.source)


def read_documents(path: Path, separator: str | None = None, column: str = "text") -> list[str]:
    """Read the documents of a text file: the whole, or its parts between separators, or a value per JSON line."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as handle:
            if plain.suffix != ".jsonl":
                text = handle.read()
                return [part.strip() for part in text.split(separator)] if separator else [text]
            return ["" + json.loads(line)[column] for line in handle if line.strip()]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise CompressError(f"text file {path}: cannot be read ({error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CompressError(f"text file {path}: not JSON lines with the key {column!r} ({error}).") from error


def _documents(settings: Calibration) -> tuple[Iterable[str], dict[str, object], bool]:
    """Return the texts, what the manifest records of them, and whether each is a document of its own."""
    if settings.builtin:
        texts = read_modules(CALIBRATION)
        return texts.values(), {"builtin": settings.builtin, "sha256": fingerprint(texts)}, False
    if settings.text is not None:
        path = Path(settings.text)
        documents = read_documents(path, settings.separator, settings.column)
        separate = bool(settings.separator) or settings.text.removesuffix(".gz").endswith("jsonl")
        return documents, {"text": path.name, "sha256": sha256_of(path)}, separate
    return _dataset(settings), {"dataset": settings.dataset, "name": settings.name, "split": settings.split}, True


def _dataset(settings: Calibration) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CompressError("calibration.dataset needs datasets: pip install 'compress-llm[data]'.") from error
    try:
        for row in load_dataset(settings.dataset, settings.name, split=settings.split, streaming=True):
            yield str(row[settings.column])
    except KeyError as error:
        raise CompressError(f"calibration.column: dataset {settings.dataset!r} has no column {error}.") from error
    except Exception as error:  # the library's own errors are of many kinds
        raise CompressError(f"calibration.dataset {settings.dataset!r} cannot be loaded: {error}") from error


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens every document starts with: BOS where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, without special ones and without a warning about its length."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def draw_samples(settings: Calibration, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> Samples:
    """Draw the first documents that are long enough, cut to ``length`` tokens; or, from one long text, even windows."""
    if context_length is not None and settings.length > context_length:
        raise CompressError(
            f"calibration.length: {settings.length} tokens, but the model's context holds {context_length}; lower it."
        )
    documents, source, separate = _documents(settings)
    start = bos_tokens(tokenizer)
    long_enough = (text for text in documents if len(text) >= max(settings.min_characters, 1))
    if separate:
        cut = (start + token_ids(tokenizer, text)[: settings.length - len(start)] for text in long_enough)
        sequences = list(islice((tokens for tokens in cut if len(tokens) >= 2), settings.samples))
    else:
        stream = [token for text in long_enough for token in token_ids(tokenizer, text)]
        length = settings.length - len(start)
        available = len(stream) // length  # windows without overlap, taken evenly over the whole text
        count = min(available, settings.samples)
        firsts = [index * available // count * length for index in range(count)]
        sequences = [start + stream[first : first + length] for first in firsts]
    if len(sequences) < settings.samples:
        raise CompressError(
            f"calibration.samples: {settings.samples} asked for, but the text gives {len(sequences)} of "
            f"{settings.length} tokens; lower samples or length, or give more text."
        )
    tokens = tuple(torch.tensor(sequence, dtype=torch.long) for sequence in sequences)
    return Samples(tokens, {**source, "samples": len(tokens), "tokens": sum(map(len, sequences))})
