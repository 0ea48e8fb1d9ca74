#!/usr/bin/env bash
# peft 0.21.2: behind a tuned prompt, a text padded on the left gets other logits than it gets alone.
# Expected: padding is masked, so a row's logits do not depend on how long the other rows of its batch are; without a prompt that is so.
# Seen: the virtual tokens go in front of the padding, so the distance between prompt and text grows with the padding. Position ids that would
#   close the gap are dropped: "Position ids are not supported for parameter efficient tuning. Ignoring position ids."
# Matters: batched answers depend on the batch; generation is padded on the left. Rows of one length, or padding on the right, are right.
# Output:
#   no prompt: 0.0000
#   prompt: 4.4633
#   prompt, position ids given: 4.4633
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
                     initializer_range=0.5)
base = LlamaForCausalLM(config).eval()
padded, alone = torch.tensor([[0, 0, 0, 5, 9, 12]]), torch.tensor([[5, 9, 12]])
mask = (padded != 0).long()
places = torch.tensor([[4, 4, 4, 4, 5, 6]])  # the text directly behind four virtual tokens


@torch.no_grad()
def difference(model, **more):
    one = model(input_ids=padded, attention_mask=mask, **more).logits[:, -1]
    return (one - model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[:, -1]).abs().max().item()


plain = difference(base)
model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
prompt, placed = difference(model), difference(model, position_ids=places)
print(f"no prompt: {plain:.4f}\nprompt: {prompt:.4f}\nprompt, position ids given: {placed:.4f}")
if plain > 1e-3 or prompt < 1e-3 or placed < 1e-3:
    sys.exit("changed: logits behind a prompt no longer depend on left padding in the way recorded here.")
PYTHON
