#!/usr/bin/env bash
# transformers 5.24.0: a checkpoint of a quantisation method that is not installed loads as a model with random weights.
# Expected: an error, since no tensor of the quantised layers can be read.
# Seen: an unknown quant_method is a log line; the layers are then built dense, their weights are drawn at random and the stored tensors
#   ignored, with a table of names in the log. from_pretrained returns, and each load gives another model. Where the packed tensor is stored
#   as `weight` in another shape, the load stops.
# Matters: a forgotten import gives a model that runs and talks nonsense; a format can prevent that by its choice of names.
# Output:
#   stored as qweight: loads, q_proj differs between two loads: True, from the original: True
#   stored as weight, packed: RuntimeError
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - "$dir/model" <<'PYTHON'
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity(logging.CRITICAL)
logging.disable_progress_bar()
folder, file = sys.argv[1], f"{sys.argv[1]}/model.safetensors"
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LlamaForCausalLM(config).save_pretrained(folder)
dense = load_file(file)
config.quantization_config = {"quant_method": "not-installed"}
config.save_pretrained(folder)


def load(stored_as):
    tensors = {name: tensor for name, tensor in dense.items() if "proj" not in name}
    for name in dense.keys() - tensors.keys():
        tensors[name.removesuffix("weight") + stored_as] = torch.zeros(4, len(dense[name]), 1, dtype=torch.int32)
    save_file(tensors, file, {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight


first, second = load("qweight"), load("qweight")
apart, lost = not torch.equal(first, second), not torch.equal(first, dense["model.layers.0.self_attn.q_proj.weight"])
print(f"stored as qweight: loads, q_proj differs between two loads: {apart}, from the original: {lost}")
try:
    stopped = type(load("weight")).__name__
except RuntimeError as error:
    stopped = type(error).__name__
print("stored as weight, packed:", stopped)
if not (apart and lost) or stopped != "RuntimeError":
    sys.exit("changed: an unknown quantisation method is no longer loaded as recorded here.")
PYTHON
