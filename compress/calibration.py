"""Draw calibration samples from text."""

from __future__ import annotations

import gzip
import json
import logging
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
from compress.tokens import bos_tokens, count_special, front_tokens, token_ids
from compress.weights import sha256_of
from compress.workspace import digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Hold token sequences, int64 [T] each with BOS in front where the tokenizer has one, and what the manifest says of them."""

    tokens: tuple[Tensor, ...]
    source: dict[str, object]

    @property
    def key(self) -> str:
        """Return a digest of the tokens."""
        return digest([sample.tolist() for sample in self.tokens])

    def first(self, count: int | None, length: int | None = None) -> Samples:
        """Return the first few of them, and of each the first tokens; all for None."""
        return Samples(tuple(tokens[:length] for tokens in self.tokens[:count]), self.source)


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


def draw_samples(settings: Calibration, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> Samples:
    """Draw the first documents that are long enough, cut to ``length`` tokens; or, from one long text, even windows."""
    if context_length is not None and settings.length > context_length:
        raise CompressError(
            f"calibration.length: {settings.length} tokens, but the model's context holds {context_length}; lower it."
        )
    documents, source, separate = _documents(settings)
    start, read = front_tokens(tokenizer) + bos_tokens(tokenizer), list[str]()

    def tokens_of(text: str) -> list[int]:
        read.append(text)
        return token_ids(tokenizer, text, settings.special_tokens)

    long_enough = (text for text in documents if len(text) >= max(settings.min_characters, 1))
    if separate:
        cut = (start + tokens_of(text)[: settings.length - len(start)] for text in long_enough)
        sequences = list(islice((tokens for tokens in cut if len(tokens) >= 2), settings.samples))
    else:
        stream = [token for text in long_enough for token in tokens_of(text)]
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
    spelled = count_special(tokenizer, read)
    if spelled and not settings.special_tokens:
        _log.warning(
            "the calibration text spells %d special tokens, which are read as plain text; special_tokens: true reads them as such.",
            spelled,
        )
    said = {
        "samples": len(tokens),
        "tokens": sum(map(len, sequences)),
        "bos": tokenizer.bos_token,
        "special_tokens_in_text": spelled,
        "special_tokens_read_as": "special tokens" if settings.special_tokens else "text",
    }
    return Samples(tokens, {**source, **said})
