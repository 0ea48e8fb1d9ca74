"""Write docs/models.md: every type of language model that transformers has, and what the library does with it.

    python -m tests.models > docs/models.md     # a few minutes; no weights are needed, and none are fetched
    python -m tests.models mixtral gemma3       # the rows of some types

Each type's default config, at its full size, is inspected as ``compress inspect --structure`` does it.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from compress.outline import lines, outline
from compress.structure import ARCHITECTURES
from tests.conftest import MODELS

HEAD = """# Models

The library finds out by itself where blocks, linears, experts, embedding and head are in a model, and how its blocks are called: it builds the class of
transformers without weights and follows one forward pass with tensors that have shapes and no data. So no list says what is
supported: try `compress inspect MODEL --structure`, for which a `config.json` is enough.

```
$ compress inspect Qwen3-30B-A3B --structure
{example}
```

* Types of images and text are taken with the language model inside: its blocks are compressed, the rest stays as it is, and the whole model loads again
  (`compress.load`, or `AutoModelForImageTextToText.from_pretrained` after `import compress`).
* Every expert of a mixture is a matrix like any other: it has codebooks, errors and bits of its own. Its Hessian is that of the tokens routed
  to it, mixed with what is known without them, counted as as many tokens as it has columns.
* What the model reads without calling it (`dt_proj` of Mamba, the indexer of sparse attention) stays dense, and so do routers, convolutions and recurrent
  parameters. The manifest's `not_quantised` lists every matrix that stays dense, with the reason.
* Tensors that files hold beyond the model, heads that predict several tokens for example, are kept as they are and listed there too.
* What blocks hand on besides the hidden states, keys and values that later blocks share (Gemma 3n, the small Gemma 4), a router's state or chosen
  tokens, travels with these from block to block, and has a gradient like them.
* Weights that several blocks share (Zamba) stay dense, and are stored once.
* What cannot be run one block at a time is refused before any work, with the reason, and so is a model of which less than half could be packed. Structured pruning (`mini_llm`) works on the types that
  are declared for it. Unstructured pruning, LoRA recovery, `tune_tables` and soft prompts have been tried on the declared types and on a tiny `qwen3_moe`.

`tests/compress/test_models.py` compresses, loads, checks and generates with {sample} of these types, as tiny random models. The table is
of transformers {version}, written by `python -m tests.models`: *packed* is the share of all parameters in linears that quantising passes take, of the type's
default config; the rest is embeddings, heads, towers of images and what the last column names.

| type | packed | experts | structured pruning | stays dense inside the blocks, or why it is refused |
|---|---|---|---|---|"""


def kinds() -> list[str]:
    """Return every type of a causal language model, or one of images and text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


_THIRDS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [8, 12, 12],
        "partial_rotary_factor": 0.5,
    }
}
PUBLISHED = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
    **{key: {"text_config": _THIRDS} for key in ("glm4v", "glm46v", "glmga")},
    "glm4v_moe": {"text_config": {**_THIRDS, "head_dim": 128}},
}
"""What default configs lack that checkpoints on the hub have, and without which transformers does not run them."""


def row(kind: str, folder: Path) -> str:
    """Inspect a type's default config; return a line of the table."""
    try:
        config = transformers.CONFIG_MAPPING[kind](**PUBLISHED.get(kind, {})).to_dict()
        name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        config["architectures"] = [name if isinstance(name, str) else name[0]]
        (folder / "config.json").write_text(json.dumps(config, default=str))
        found = outline(str(folder))
    except Exception as error:  # transformers' own: some default configs make no model
        return f"| {kind} | | | | not built: {clean(error)} |"
    if found["refused"]:
        return f"| {kind} | | | | refused: {clean(found['refused'].removeprefix(f'model type {kind!r}: '))} |"
    packed = sum(entry["count"] * math.prod(entry["shape"]) for entry in found["matrices"].values())
    experts = max(found["experts"].values(), default="")
    structured = "yes" if any(kind in known.model_types for known in ARCHITECTURES) else ""
    left = "; ".join(f"`{name.partition('*.')[2] or name}`: {entry['reason']}" for name, entry in found["left"].items())
    return f"| {kind} | {100 * packed / found['parameters']:.0f} % | {experts} | {structured} | {left} |"


def clean(said: object) -> str:
    """Return a message as one cell of a table."""
    return " ".join(str(said).split()).replace("|", "/")[:300]


def main() -> Iterator[str]:
    """Yield the lines of the page, or the rows of the types that are named."""
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        if not chosen:
            config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128}
            sizes = {
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
            }
            (Path(place) / "config.json").write_text(
                json.dumps({**config, **sizes, "head_dim": 128, "vocab_size": 151936})
            )

            yield HEAD.format(
                example="\n".join(lines(outline(place))), version=version("transformers"), sample=len(MODELS)
            )
        yield from (row(kind, Path(place)) for kind in chosen or kinds())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for line in main():
        print(line, flush=True)
