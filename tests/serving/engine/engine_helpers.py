"""Checkpoints for a real vLLM, and what the library itself generates from them."""

from pathlib import Path

import torch

import compress
from compress.hub import located

NEW = 24
PROMPTS = [[4, 9, 77, 210], [300, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [1999, 3, 3, 70], [150, 151, 152]]
TEXT = {"builtin": "stdlib", "samples": 4, "length": 64}
NESTED = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 6, "sensitivity": "none"}
SHARED = {**NESTED, "sensitivity": "activation", "objective": "output", "codebooks": "shared", "correction": 0}
PASSES = {
    "row": [{**NESTED, "objective": "weight"}],
    "shared": [{**SHARED, "embedding_bits": "auto"}],
    "sparse": [
        {"kind": "prune", "score": "magnitude", "sparsity": 0.9},
        {**NESTED, "objective": "weight", "keep_zeros": True},
    ],
    "mixed": [{"kind": "kmeans", "bits": 4, "ignore": ["re:.*layers.0.self_attn.k_proj", "re:.*layers.1.mlp.up_proj"]}],
    "one layer dense": [{"kind": "rtn", "bits": 4, "ignore": ["re:.*layers.0.*"]}],
}


def random_model(kind: str, folder: Path) -> Path:
    """Save a random model of the built-in one's sizes and another type, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    builtin = located("builtin", {})[0]
    sizes = {"hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 2, "num_attention_heads": 6}
    more = {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 512}
    if kind == "llama":  # halves of whole groups of columns, which share a size
        sizes |= {"intermediate_size": 512, "num_attention_heads": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **more, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin).save_pretrained(folder)
    return folder


def make(name: str, folder: str) -> None:
    """Write a checkpoint, by the name of its passes or of its model's type."""
    model = "builtin" if name in PASSES else str(random_model(name, Path(f"{folder} dense")))
    compress.run({"model": model, "calibration": TEXT, "passes": PASSES.get(name, PASSES["shared"])}, folder)


def greedy(folder: Path, bits, **more) -> list[list[int]]:
    """Return the tokens that the library itself generates, in float32."""
    model = compress.load(folder, bits=bits, dtype=torch.float32, **more)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(made[0, len(prompt) :].tolist())
    return found


def tokens_of(llm, prompts=None) -> list[list[int]]:
    """Return the tokens that an engine generates, all prompts in one batch."""
    from vllm import SamplingParams

    greedily = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    prompts = prompts or [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(made.outputs[0].token_ids) for made in llm.generate(prompts, greedily, use_tqdm=False)]


def greedy_text(folder: Path, bits, prompts: list[str], new: int) -> list[str]:
    """Return the text that the library itself generates, in float32, up to the end of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = compress.load(folder, bits=bits, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found
