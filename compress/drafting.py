"""Self-speculation: a model's low planes draft tokens, all of its planes check them in one pass; the text stays what it would be.

It is a decoding loop for ``model.generate(tokens, custom_generate=Drafting(compress.view(model, bits=3)))``: everything around it,
settings, processors of logits, stop strings, streaming, is transformers' own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from compress.config import Bits
from compress.decoding import JOINED, Short
from compress.errors import CompressError
from compress.hf import cache_name
from compress.loading import set_bits
from compress.quant.embedding import BitPlaneHead
from compress.quant.linear import PackedModule

_DRAFTED = 4  # tokens, where transformers drafts by itself
_MOST = 8  # drafted tokens in a round
_AGAIN = 16  # rounds without a draft before it is tried again
_MEMORY = 0.95  # weight of what was accepted before, against the latest token


def view(model: PreTrainedModel, bits: Bits, exact: bool | None = None) -> PreTrainedModel:
    """Return a model of the same tensors that is read at other bits, for drafts of what ``model`` then checks.

    ``model.generate(tokens, assistant_model=compress.view(model, bits=3))`` writes what ``model.generate(tokens)`` does. Beyond
    ``model``, a view takes the memory of its cache of keys and values (:class:`Drafting` gives it the model's own), and of what a
    backend derives from codebooks at its bits. It is of the tensors that the model has now: moved or cast later, the two part.

    Args:
        model: loaded by :func:`compress.load` or ``from_pretrained``, with as many bits as both need.
        bits: as for :func:`compress.set_bits`.
        exact: as for :func:`compress.load`; as the model has it if None.

    Raises:
        CompressError: the model has no packed modules, or the bits were not loaded.
    """
    made: PreTrainedModel = _twin(model, {})
    set_bits(made, bits)
    for module in made.modules():
        if isinstance(module, PackedModule) and exact is not None:
            module.exact = exact
    made.generation_config = copy.deepcopy(model.generation_config)
    made.generation_config.num_assistant_tokens = _DRAFTED
    return made


def _twin(module: Any, made: dict[int, nn.Module]) -> Any:
    """Copy the tree of modules and none of its tensors; a module that is there twice stays one."""
    if id(module) in made:
        return made[id(module)]
    twin = made[id(module)] = module.__class__.__new__(module.__class__)
    held = module.__getstate__() if isinstance(module, PackedModule) else module.__dict__
    own = {name: copy.copy(value) if isinstance(value, (dict, set)) else value for name, value in held.items()}
    own.pop(JOINED, None)
    own["_modules"] = {name: None if child is None else _twin(child, made) for name, child in module._modules.items()}
    twin.__dict__.update(own)
    if isinstance(twin, BitPlaneHead):
        twin._of = (_twin(module.embedding, made),)
    return twin


@dataclass
class Decoding:
    """Decode one sequence token by token, in less time than transformers' own loop; given to ``generate`` as ``custom_generate``.

    Where the model is a Llama on a CPU, packed and unwatched, tokens are computed past transformers' modules
    (:class:`compress.decoding.Short`); the text is the same.

    Args:
        streamer: told of the prompt and of every token; give it here, as ``generate`` hands none on to a loop of another's.
    """

    streamer: Any = field(default=None, kw_only=True)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **given: Any,
    ) -> Any:
        """Decode one sequence, int64 [1, T]; called by ``generate``.

        Raises:
            CompressError: several sequences, padding, or embeddings in the place of tokens.
        """
        mask, kind = given.get("attention_mask"), type(self).__name__
        if len(input_ids) != 1 or not (mask is None or bool((mask == 1).all())):
            raise CompressError(f"{kind} is for one sequence without padding: give one prompt.")
        if given.get("inputs_embeds") is not None:
            raise CompressError(
                f"{kind} reads tokens: give input_ids in place of inputs_embeds, or generate without it."
            )
        name, sampled = cache_name(model), bool(generation_config.do_sample)
        cache = given.get(name)
        reader = _Reader(model, name, DynamicCache(config=model.config) if cache is None else cache)
        ids, done = input_ids, False
        self._tell(ids)
        while not done:
            for token in self._next(reader, ids, logits_processor, sampled):
                ids = torch.cat([ids, token], 1)
                self._tell(token)
                if done := bool(stopping_criteria(ids, None).all()):
                    break
            reader.forget_after(ids.shape[1] - 1)
        if self.streamer is not None:
            self.streamer.end()
        return (
            GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, ids))
            if generation_config.return_dict_in_generate
            else ids
        )

    def _next(self, reader: _Reader, ids: Tensor, processor: Any, sampled: bool) -> list[Tensor]:
        """Return the tokens that come next, [1, 1] each."""
        return [_chosen(processor(ids, reader.read(ids, 1)[:, -1].float()), sampled)]

    def _tell(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens[0].cpu())


@dataclass
class Drafting(Decoding):
    """Decode with drafts; an instance is given to ``generate`` as ``custom_generate`` and counts what it does.

    How many tokens a round drafts follows from the share that was accepted so far and from the two costs below, so that a draft which
    does not pay is seldom made. It never follows from the clock: a seed gives the same text on any machine.

    Args:
        draft: reads the same tokens, :func:`compress.view` of the model.
        cost: of a drafted token, in tokens decoded by the model itself.
        check: of one more token in the pass that checks, likewise.
        tokens: draft always so many; None chooses.
        streamer: as of :class:`Decoding`.
    """

    draft: PreTrainedModel
    cost: float = 0.35
    check: float = 0.15
    tokens: int | None = None
    share: float = 0.7  # of drafted tokens that were accepted, of late
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    _waited: int = 0

    def _next(self, reader: _Reader, ids: Tensor, processor: Any, sampled: bool) -> list[Tensor]:
        """Return the drafted tokens that are accepted, and one of the model's own."""
        if reader.draft is None or reader.draft.cache is not reader.cache:
            reader.draft = _Reader(self.draft, reader.name, reader.cache)
        proposed, beliefs = self._propose(reader.draft, ids, processor, sampled)
        logits = reader.read(torch.cat([ids, proposed], 1), proposed.shape[1] + 1)
        return self._check(ids, proposed, beliefs, logits, processor, sampled)

    def count(self) -> int:
        """Return how many tokens the next round drafts: what gives most tokens per cost at the share accepted so far."""
        if self.tokens is not None:
            return self.tokens
        share = min(self.share, 0.999)

        def worth(count: int) -> float:
            return (1 - share ** (count + 1)) / (1 - share) / (1 + count * (self.cost + self.check))

        best = max(range(_MOST + 1), key=worth)
        self._waited = 0 if best or self._waited >= _AGAIN else self._waited + 1
        return best if best or self._waited else 1

    def _propose(self, reader: _Reader, ids: Tensor, processor: Any, sampled: bool) -> tuple[Tensor, list[Tensor]]:
        """Draft tokens, [1, n], and the probabilities they were drawn from; none before the model has read all tokens but the last."""
        proposed, beliefs = ids[:, :0], []
        for _ in range(self.count() if reader.cache.get_seq_length() == ids.shape[1] - 1 else 0):
            longer = torch.cat([ids, proposed], 1)
            scores = processor(longer, reader.read(longer, 1)[:, -1].float())
            beliefs.append(scores.softmax(-1))
            proposed = torch.cat([proposed, _drawn(beliefs[-1], sampled)], 1)
        reader.forget_after(ids.shape[1] - 1)  # what the draft saw in them; the model reads them again
        return proposed, beliefs

    def _check(
        self, ids: Tensor, proposed: Tensor, beliefs: list[Tensor], logits: Tensor, processor: Any, sampled: bool
    ) -> list[Tensor]:
        """Return the tokens, [1, 1] each, that the model would write: those accepted and one of its own.

        Of a drafted token with probability q, p in the model, min(1, p / q) are accepted; what replaces one that is not is drawn
        from max(0, p - q) (Leviathan et al., 2023, algorithm 1).
        """
        self.rounds += 1
        tokens: list[Tensor] = []
        for place in range(proposed.shape[1] + 1):
            scores = processor(torch.cat([ids, *tokens], 1), logits[:, place].float())
            if place == proposed.shape[1]:
                tokens.append(_chosen(scores, sampled))
                break
            token, belief = proposed[:, place : place + 1], beliefs[place]
            if sampled:
                own = scores.softmax(-1)
                right = bool(torch.rand(()) * belief.gather(1, token) <= own.gather(1, token))
                instead = _drawn((own - belief).clamp_min(0), sampled) if not right else token
            else:
                instead = scores.argmax(-1, keepdim=True)
                right = bool(instead == token)
            tokens.append(instead)
            self.drafted, self.accepted = self.drafted + 1, self.accepted + right
            self.share = _MEMORY * self.share + (1 - _MEMORY) * right
            if not right:
                break
        return tokens


def _drawn(probabilities: Tensor, sampled: bool) -> Tensor:
    """Draw a token, [1, 1], or take the likeliest."""
    return torch.multinomial(probabilities, 1) if sampled else probabilities.argmax(-1, keepdim=True)


def _chosen(scores: Tensor, sampled: bool) -> Tensor:
    """Draw a token by processed logits, [1, V] to [1, 1], or take the likeliest, as transformers does."""
    return _drawn(scores.softmax(-1), sampled) if sampled else scores.argmax(-1, keepdim=True)


@dataclass
class _Reader:
    """Read a growing sequence with a model, what is new of it, behind a cache that the draft and the model share."""

    model: Any
    name: str
    cache: Any
    draft: _Reader | None = None

    def __post_init__(self) -> None:
        self.short = Short(self.model, self.cache) if Short.fits(self.model) else None

    def read(self, ids: Tensor, last: int) -> Tensor:
        """Return the logits of the last tokens, [1, last, V]."""
        new = ids[:, self.cache.get_seq_length() :]
        if self.short is not None and (found := self.short(new)) is not None:
            return found
        output = self.model(input_ids=new, use_cache=True, logits_to_keep=last, **{self.name: self.cache})
        self.cache = output[self.name]  # a model with a packed cache by default hands another back
        logits: Tensor = output.logits[:, -last:]
        return logits

    def forget_after(self, tokens: int) -> None:
        """Take what lies behind the first tokens out of the cache."""
        surplus = self.cache.get_seq_length() - tokens
        if surplus > 0:
            self.cache.crop(-surplus)
