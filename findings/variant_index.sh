#!/usr/bin/env bash
# transformers 5.24.0: the index of a sharded variant puts the variant in another place than all other files of the variant do.
# Expected: a variant "4bit" is written as model.4bit.safetensors, so its index would be model.4bit.safetensors.index.json.
# Seen: the index is model.safetensors.index.4bit.json. Under the other name it is not found, and the error speaks of a single file. An index
#   may name any files of the folder, so several variants can share shards, and a load reads (and fetches) what its own index names only.
# Matters: whoever writes checkpoints of several variants by hand has to know the name; nothing but the code has it.
# Output:
#   one file: model.4bit.safetensors
#   sharded: model.safetensors.index.4bit.json
#   variant="4bit" with model.safetensors.index.4bit.json: loads
#   variant="4bit" with model.4bit.safetensors.index.json: no file named model.4bit.safetensors
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - "$dir" <<'PYTHON'
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
one, sharded = Path(sys.argv[1]) / "one", Path(sys.argv[1]) / "sharded"
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))
model.save_pretrained(one, variant="4bit")
model.save_pretrained(sharded, variant="4bit", max_shard_size="20KB")
single, index = next(one.glob("*.safetensors")).name, next(sharded.glob("*index*")).name
print(f"one file: {single}\nsharded: {index}")


def load():
    try:
        AutoModelForCausalLM.from_pretrained(sharded, variant="4bit")
    except OSError as error:
        return str(error).removeprefix("Error ").split(",")[0]
    return "loads"


guess = "model.4bit.safetensors.index.json"
first = load()
(sharded / index).rename(sharded / guess)
second = load()
print(f'variant="4bit" with {index}: {first}\nvariant="4bit" with {guess}: {second}')
if (index, first) != ("model.safetensors.index.4bit.json", "loads") or second == "loads":
    sys.exit("changed: the index of a variant has another name than recorded here.")
PYTHON
