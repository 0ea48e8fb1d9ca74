#!/usr/bin/env bash
# transformers 5.24.0 with peft 0.21.2: an adapter saved into its base model's folder changes what from_pretrained(folder) gives.
# Expected: AutoModelForCausalLM.from_pretrained(folder) gives the model of config.json and model.safetensors; adapters are asked for.
# Seen: adapter_config.json is looked for first. A LoRA adapter is put into the model without a word (class and call are unchanged, logits are
#   not); a tuned prompt ends the load with an error that names an inner function and neither the file nor the remedy.
# Matters: a prompt "beside" a model makes the model unreadable, and a LoRA adapter there is measured as if it were the base.
# Output:
#   base alone: max difference 0.0000
#   with a LoRA adapter: LlamaForCausalLM, max difference 0.0065
#   with a tuned prompt: ValueError: `create_and_replace` does not support prompt learning, adaption prompt and shadow yet.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - "$dir/model" <<'PYTHON'
import sys
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
folder = sys.argv[1]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
model.save_pretrained(folder)
ids = torch.tensor([[5, 9, 12]])
expected = model(input_ids=ids).logits


def difference():
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return type(loaded).__name__, (loaded(input_ids=ids).logits - expected).abs().max().item()


alone = difference()[1]
lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(folder)
kind, adapted = difference()
print(f"base alone: max difference {alone:.4f}\nwith a LoRA adapter: {kind}, max difference {adapted:.4f}")
get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(folder)
try:
    raised = difference()[0]
except ValueError as error:
    raised = f"ValueError: {error}"
print("with a tuned prompt:", raised)
if alone or kind != "LlamaForCausalLM" or adapted < 1e-4 or "create_and_replace" not in raised:
    sys.exit("changed: an adapter in the base model's folder is no longer treated as recorded here.")
PYTHON
