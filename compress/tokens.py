"""Turn text into tokens, by one rule for calibration, evaluation and generation.

Text is text: a special token that it spells (``<unk>``, say) is read as the letters it is made of, unless it is asked for. BOS is
in front of a document once, where the tokenizer has one, whether or not the tokenizer puts it there by itself.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import CompressError, first_line


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens every document starts with: BOS where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def front_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts in front of every text besides BOS: the virtual tokens of a baked prompt, say."""
    return [token for token in _put_in_front(tokenizer) if token != tokenizer.bos_token_id]


def _put_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next((place for place in starts if whole[place : place + len(plain)] == plain), 0)]


def reading(special_tokens: bool = False) -> dict[str, Any]:
    """Return how a tokenizer is to be called on a text: without adding tokens or warning of its length."""
    return {"add_special_tokens": False, "split_special_tokens": not special_tokens, "verbose": False}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False) -> list[int]:
    """Return the tokens of a text, to which nothing is added; with ``special_tokens`` those it spells are read as such."""
    return list(tokenizer(text, **reading(special_tokens))["input_ids"])


def count_special(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """Count the special tokens that texts spell."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - {""}
    if not names:
        return 0
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    return sum(sum(1 for _ in pattern.finditer(text)) for text in texts)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool = False) -> list[int]:
    """Return the tokens of a text to continue, special ones that it spells among them, as the tokenizer begins it.

    BOS is never there twice, and nothing is put behind the text. With ``chat`` it is what a user says, in the model's template.
    """
    if not chat:
        front, ids = _put_in_front(tokenizer), token_ids(tokenizer, text, special_tokens=True)
        return ids if front and ids[: len(front)] == front else front + ids
    if not tokenizer.chat_template:
        raise CompressError("--chat: the model's tokenizer has no chat template; give the text as it is.")
    said = [{"role": "user", "content": text}]
    try:
        whole = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs: they raise what they like
        raise CompressError(f"--chat: the model's chat template fails ({first_line(error)}).") from error
    return token_ids(tokenizer, str(whole), special_tokens=True)


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave a model nothing of its own generation settings but its special tokens.

    Beams, sampling, penalties, stop strings or lengths that a model's ``generation_config.json`` sets would otherwise be in
    force, unseen, in whatever is generated. Tokens that are never to be generated stay so.
    """
    layers: list[Any] = [model]
    while hasattr(layers[-1], "get_base_model"):  # adapters and prompts lie around a model
        layers.append(layers[-1].get_base_model())
    own = layers[-1].generation_config
    ends = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    padding = next(
        (token for token in (own.pad_token_id, tokenizer.pad_token_id) if token is not None),
        ends[0] if isinstance(ends, list) else ends,
    )
    for layer in layers:
        layer.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=own.bos_token_id, eos_token_id=ends, pad_token_id=padding, suppress_tokens=own.suppress_tokens
        )
