"""Train the built-in model: ``python -m compress.evals.experiments.train_builtin OUT [--steps N] [--shape deep]``.

A byte-level BPE tokenizer and a Llama, an OPT, or a Mixtral of 8 experts, of 2.7 M parameters, on the standard library's source
files (see :mod:`compress.texts`). It takes about two hours on two CPU cores; an interrupted training continues.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from compress.errors import CompressError
from compress.evals.grids import script
from compress.texts import SEPARATOR, fingerprint, stdlib, training_files

VOCABULARY = 2048
CONTEXT = 512
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # model type and sizes
    # grouped-query attention, tied embeddings, and an inner size that no power of two divides
    "builtin": (
        "llama",
        {"hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 6, "num_attention_heads": 6}
        | {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
    # biases, layer norms, learned positions, ReLU
    "deep": (
        "opt",
        {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "num_hidden_layers": 12}
        | {"num_attention_heads": 4, "dropout": 0.0, "pad_token_id": 0},
    ),
    # each token is sent to two of eight experts, and the loss asks for their equal use
    "mixture": (
        "mixtral",
        {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
        | {"tie_word_embeddings": True, "router_aux_loss_coef": 0.01, "output_router_logits": True},
    ),
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose one special token separates and starts documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=CONTEXT
    )


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the model, and for the training's own checkpoints.")],
    steps: Annotated[int, typer.Option(help="Steps of AdamW.")] = 5000,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    shape: Annotated[str, typer.Option(help="builtin, deep or mixture.")] = "builtin",
) -> None:
    """Train, resume where a run was interrupted, and save in bfloat16."""
    if shape not in SHAPES:
        raise CompressError(f"--shape: there is no {shape!r}; known: {', '.join(SHAPES)}.")
    set_seed(0)
    files = training_files()
    texts = {str(path.relative_to(stdlib())): path.read_text("utf-8", "ignore") for path in files}
    tokenizer = train_tokenizer(list(texts.values()))
    stream = torch.tensor([token for text in texts.values() for token in (0, *tokenizer(text)["input_ids"])])
    starts = torch.randint(len(stream) - CONTEXT, (steps * batch,), generator=torch.Generator().manual_seed(0))
    windows = [stream[start : start + CONTEXT] for start in starts.tolist()]  # the same ones in every run
    print(f"{len(texts)} files, {sum(map(len, texts.values()))} characters, {len(stream)} tokens", flush=True)
    kind, sizes = SHAPES[shape]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **sizes))  # type: ignore[no-untyped-call]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "training"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=3e-3,
            weight_decay=0.1,
            adam_beta2=0.95,
            warmup_steps=100,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=20,
            save_steps=200,
            save_total_limit=1,
            report_to=[],
            seed=0,
        ),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    )
    resumable = any((output / "training").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumable)
    if "output_router_logits" in sizes:  # of no use from here on
        model.config.output_router_logits = False
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {"python": sys.version, "steps": steps, "batch": batch, "files": fingerprint(texts)}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    script.run(main)
