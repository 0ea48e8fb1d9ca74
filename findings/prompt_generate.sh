#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: generate() with a tuned prompt does not continue the text as the model's own forward pass does.
# Expected: greedy generate() picks the likeliest next token of the forward pass at every step, with a cache or without.
# Seen: with the cache, which is the default, tokens differ from the second on; with use_cache=False all are right. transformers hands the cache
#   over as `cache`, peft looks for `past_key_values`, finds none and puts the virtual tokens in front of each new token again. Nothing is said.
#   transformers 5.24.0 checks for peft 0.22.0 in its own adapter methods only, and neither package's metadata has a bound: pip installs both.
# Matters: perplexity and log-likelihoods are right, only text is wrong, so a good prompt looks useless in chat and in generation tasks.
# Output:
#   forward   [29, 60, 2, 2, 56, 60, 60, 4]
#   generate  [29, 2, 2, 2, 47, 38, 13, 21]
#   no cache  [29, 60, 2, 2, 56, 60, 60, 4]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - <<'PYTHON'
import sys
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     initializer_range=0.5, eos_token_id=None)
model = get_peft_model(LlamaForCausalLM(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
start = forward = torch.tensor([[5, 9, 12]])
with torch.no_grad():
    for _ in range(8):
        forward = torch.cat([forward, model(input_ids=forward).logits[:, -1:].argmax(-1)], 1)
greedy = dict(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False, pad_token_id=0)
found = {"forward": forward, "generate": model.generate(**greedy), "no cache": model.generate(**greedy, use_cache=False)}
for name, tokens in found.items():
    print(f"{name:9}", tokens[0, 3:].tolist())
if torch.equal(found["generate"], forward) or not torch.equal(found["no cache"], forward):
    sys.exit("changed: cached generation no longer differs from the forward pass in the way recorded here.")
PYTHON
