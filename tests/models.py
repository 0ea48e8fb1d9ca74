"""Write docs/models.md: every type of language model that transformers has, and what the library does with it.

    python -m tests.models > docs/models.md     # half an hour of one core; no weights are needed, and none are fetched
    python -m tests.models mixtral gemma3       # the rows of some types

Each type's default config, at its full size, is inspected as ``compress inspect --structure`` does it, and all work is tried on a
tiny random model of it (:mod:`tests.every`).
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from compress.errors import CompressError
from compress.outline import lines, outline
from tests.conftest import MODELS
from tests.every import COLUMNS, every
from tests.zoo import class_name, kinds, tiny_config

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
* What cannot be run one block at a time is refused before any work, with the reason, and so is a model of which less than half could be packed.
* Whole experts of mixtures can be removed (`mini_llm` with `unit: experts`, [structured pruning](structured-pruning.md#experts-of-a-mixture)); the column *structured* is about heads and channels.
* Structured pruning (`mini_llm`) works on the types that are declared for it, and on those whose blocks are an attention (queries, keys, values and an output projection,
  apart) and an MLP of two or three linears and nothing else; other types are refused in a sentence. Soft prompts are for models that take embeddings in place of tokens.
* vLLM: what the plugin refuses is *no*; *yes* says that nothing is known against it, not that vLLM has the type ([serving](serving.md) has what was tested).

The table is of transformers {version}, written by `python -m tests.models`. *packed* is the share of all parameters in linears that quantising passes
take, of the type's default config; the rest is embeddings, heads, towers of images and what the last column names. The other columns say what was done with a tiny
random model of the type: `any_precision`, loading at 3 bits with the logits of the run, `generate`, then `prune`, `soft_prompt`, `tune_tables`,
`lora_recovery` and `mini_llm`, a step each. `make test-models` does all that again and compares it with this table; `tests/compress/test_models.py` is CI's sample of {sample} types, whose
streamed logits are compared with those of transformers too.

| type | packed | experts | quantise | load | generate | prune | prompt | tune_tables | LoRA | structured | vLLM | stays dense inside the blocks, or why not |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


UNDECLARED = "is not declared for structured pruning"
USUAL = ("it has packed experts, which vLLM multiplies by kernels of its own",)


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


def facts(config: dict[str, Any], folder: Path) -> tuple[str, str, str]:
    """Inspect a config; return the share that is packed, the number of experts, and what stays dense inside the blocks.

    Raises:
        CompressError: the model cannot be compressed.
    """
    (folder / "config.json").write_text(json.dumps(config, default=str))
    found = outline(str(folder))
    if found["refused"]:
        raise CompressError(found["refused"])
    packed = sum(entry["count"] * math.prod(entry["shape"]) for entry in found["matrices"].values())
    left = "; ".join(f"`{name.partition('*.')[2] or name}`: {entry['reason']}" for name, entry in found["left"].items())
    return f"{100 * packed / found['parameters']:.0f} %", str(max(found["experts"].values(), default="")), left


def row(found: dict[str, Any], folder: Path) -> str:
    """Return a line of the table: what was found of a type's default config, and what was tried on a tiny model of it."""
    kind = found["type"]
    packed = experts = left = ""
    try:
        default = transformers.CONFIG_MAPPING[kind](**PUBLISHED.get(kind, {})).to_dict()
        packed, experts, left = facts({**default, "architectures": [class_name(kind)]}, folder)
    except Exception:  # transformers' own: some default configs make no model
        if found.get("quantise") == "yes":
            tiny = {**tiny_config(kind).to_dict(), "architectures": [class_name(kind)]}
            left = facts(tiny, folder)[2]
    if found.get("quantise") != "yes":
        reason = found.get("quantise") or f"not tried, as no tiny model can be made ({found['built']})"
        return f"| {kind} | {packed} | {experts} |{' |' * len(COLUMNS)} {clean(reason.removeprefix(f'model type {kind!r}: '))} |"
    cells = " | ".join("yes" if found[column] == "yes" else "no" for column in COLUMNS)
    notes = [
        f"{column}: {clean(found[column])}"
        for column in COLUMNS
        if found[column] != "yes" and found[column] not in USUAL
    ]
    notes = [note for note in notes if UNDECLARED not in note]
    return f"| {kind} | {packed} | {experts} | {cells} | {'; '.join([left, *notes] if left else notes)} |"


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
        yield from (row(found, Path(place)) for found in every(chosen or kinds()))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for line in main():
        print(line, flush=True)
