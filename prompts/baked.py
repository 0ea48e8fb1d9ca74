"""Write a prompt as words of the vocabulary, for servers that know no prompt adapters: ``compress bake-prompt``.

Every virtual token becomes a special token with an embedding of its own, and the tokenizer puts all of them in front of every text;
so do its chat templates, which bring their special tokens themselves.
The logits of the old vocabulary are those of the model behind its prompt. A tied head is untied for it, unless the two are packed: the
new tokens' logits are 0, else what the head makes of their embeddings, and ``generation_config.json`` names them among those never
to be generated. In a packed embedding they are rounded to its most bits.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from compress import writer
from compress.defaults import usual_defaults
from compress.errors import CompressError, refuse_existing
from compress.loading import load_tokenizer
from compress.manifest import MANIFEST, read_manifest
from compress.models import empty_model, text_config
from compress.quant.records import EmbeddingShape, PackedShape
from compress.quant.vocabulary import with_rows
from compress.sidecars import ADAPTER_FOLDER, PEFT_WEIGHTS, find_adapter, find_prompts, read_prompt
from compress.source import checkpoint_state
from compress.streaming import State
from compress.weights import Checkpoint, Overlay, sha256_of
from compress.workspace import digest


@usual_defaults()
def bake(folder: Path, output: Path, bits: int | None = None, prompt: bool | Path = True) -> list[str]:
    """Write a checkpoint whose vocabulary holds a prompt.

    Args:
        folder: checkpoint, or a dense model.
        output: folder to create; it has no prompt adapters.
        bits: whose prompt, where there is one for each number of bits; the others are served behind it too.
        prompt: the checkpoint's own, or the folder of another.

    Returns:
        The new tokens, in order.

    Raises:
        CompressError: no prompt, a prefix, a packed embedding or head, or a tokenizer without a fast form.
    """
    refuse_existing(output)
    tensor = _prompt(folder, bits, prompt)
    state = checkpoint_state(folder)
    structure = state.structure
    model = empty_model(state.config)
    names = (structure.embedding, structure.head)
    for name in names:
        if name in state.packed and not isinstance(state.packed[name], EmbeddingShape):
            raise CompressError(
                f"{folder}: {name} is packed with a codebook per row, so no token can be added to it; make the checkpoint again."
            )
    vocabulary = int(text_config(state.config).vocab_size)
    tokenizer, added = _tokenizer(folder, len(tensor), vocabulary)
    scale = float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "vocabulary.safetensors"
        larger_tensors, packed = _vocabulary(state, names, tensor / scale)
        save_file(larger_tensors, file)
        tied = bool(state.config.tie_word_embeddings) and structure.embedding in packed
        fields = {"vocab_size": vocabulary + len(tensor), "tie_word_embeddings": tied}
        config = type(state.config).from_dict({**state.config.to_dict(), **fields})
        source = Overlay(state.source, [file])
        larger = replace(
            state, source=source, config=config, packed={**state.packed, **packed}, key=digest(state.key, added)
        )

        def write_sidecars(target: Path) -> None:
            tokenizer.save_pretrained(target)
            _check_tokenizer(target, added)
            _never_generate(target, list(range(vocabulary, vocabulary + len(added))))
            if adapter := find_adapter(folder):
                shutil.copytree(adapter, target / ADAPTER_FOLDER)

        ids = tokenizer("def compress(model):\n    return")["input_ids"]
        writer.write_checkpoint(
            larger,
            folder,
            output,
            manifest=_manifest(folder, added),
            probe_tokens=ids,
            device=torch.device("cpu"),
            write_sidecars=write_sidecars,
        )
    return added


def _manifest(folder: Path, added: list[str]) -> dict[str, Any]:
    """Return what the manifest keeps of the checkpoint that the tokens were added to, and which they are."""
    manifest = read_manifest(folder) or {
        "recipe": {"model": str(folder), "passes": [], "seed": 0},
        "model_sha256": Checkpoint(folder).sha256(),
        "calibration": None,
        "passes": [],
    }
    kept = {key: manifest[key] for key in ("recipe", "model_sha256", "calibration", "passes")}
    baked = {"from": sha256_of(folder / MANIFEST) if (folder / MANIFEST).exists() else None, "tokens": added}
    return {**kept, "baked": baked}


def _prompt(folder: Path, bits: int | None, prompt: bool | Path) -> Tensor:
    """Read the embeddings to bake, float32 [virtual tokens, embedding width]."""
    found = find_prompts(folder, prompt)
    path = found.get(bits, found.get(None))
    if path is None:
        known = ", ".join(map(str, sorted(filter(None, found))))
        raise CompressError(f"{folder}: has a prompt for each of {known} bits; say with --bits whose to bake.")
    if read_prompt(path)[0] != "PROMPT_TUNING":
        raise CompressError(f"{path}: is a prefix; only a prompt can be written as tokens.")
    return load_file(path / PEFT_WEIGHTS)["prompt_embeddings"].float()


def _vocabulary(
    state: State, names: tuple[str, str], prompt: Tensor
) -> tuple[dict[str, Tensor], dict[str, PackedShape]]:
    """Return embedding and head with rows for the new tokens, in the form they had, and the shapes of packed ones.

    Rows of the head are zeros, but where it is tied to a packed embedding.
    """
    embedding, head = names
    tied = bool(state.config.tie_word_embeddings)
    tensors, packed = dict[str, Tensor](), dict[str, PackedShape]()
    for name, rows in ((embedding, prompt), (head, torch.zeros_like(prompt))):
        shape = state.packed.get(name)
        if isinstance(shape, EmbeddingShape):
            held = {inner: f"{name}.{inner}" for inner in shape.specification()}
            found = state.source.read(held.values())
            parts = {inner: found[stored] for inner, stored in held.items()}
            packed[name], larger = with_rows(shape, parts, rows)
            tensors |= {held[inner]: tensor for inner, tensor in larger.items()}
        elif name == embedding or not (tied and embedding in packed):
            stored = f"{name}.weight" if f"{name}.weight" in state.source.info() else f"{embedding}.weight"
            dense = state.source.read([stored])[stored]
            tensors[f"{name}.weight"] = torch.cat([dense, rows.to(dense.dtype)]).contiguous()
    return tensors, packed


def _tokenizer(folder: Path, count: int, vocabulary: int) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Make a tokenizer that puts new special tokens in front of every text."""
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CompressError(
            f"{folder}: its tokenizer has no fast form, which is what can put tokens in front of a text."
        )
    if len(tokenizer) > vocabulary:
        raise CompressError(f"{folder}: its tokenizer has more tokens than the model, so no new one would be its next.")
    fillers = [f"<|unused_{place}|>" for place in range(vocabulary - len(tokenizer))]  # ids follow the embedding's rows
    added = [f"<|prompt_{place}|>" for place in range(count)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*fillers, *added]})
    ids = tokenizer.convert_tokens_to_ids(added)
    if ids != list(range(vocabulary, vocabulary + count)):
        raise CompressError(f"{folder}: its tokenizer has a token {added[0]} already; the model holds a prompt.")
    engine: Any = tokenizer.backend_tokenizer
    front = processors.TemplateProcessing(
        single=[*added, "$A"], pair=[*added, "$A", "$B"], special_tokens=list(zip(added, ids, strict=True))
    )
    engine.post_processor = processors.Sequence([engine.post_processor, front] if engine.post_processor else [front])
    templates, said = tokenizer.chat_template, "".join(added)
    if isinstance(templates, str):
        tokenizer.chat_template = said + templates
    elif templates:
        tokenizer.chat_template = {name: said + template for name, template in templates.items()}
    return tokenizer, added


def _check_tokenizer(folder: Path, added: list[str]) -> None:
    """Refuse a tokenizer that, read again, forgets what it puts in front: some classes make their own rules anew."""
    tokenizer: Any = load_tokenizer(folder)
    wanted = tokenizer.convert_tokens_to_ids(added)
    said = [{"role": "user", "content": "a"}]
    found = [tokenizer("a")["input_ids"]]
    with suppress(Exception):  # a template may refuse such a conversation
        found += [tokenizer.apply_chat_template(said, return_dict=True)["input_ids"]] if tokenizer.chat_template else []
    if any(ids[: len(wanted)] != wanted for ids in found):
        raise CompressError(
            f"{type(tokenizer).__name__}: tokenizers of this class do not keep tokens that are put in front of a text, so the prompt "
            "cannot be baked; serve it as an adapter."
        )


def _never_generate(folder: Path, ids: list[int]) -> None:
    path = folder / "generation_config.json"
    settings = GenerationConfig.from_pretrained(folder) if path.exists() else GenerationConfig()  # type: ignore[no-untyped-call]
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *ids})
    settings.save_pretrained(folder)
