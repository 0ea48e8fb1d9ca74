#!/usr/bin/env bash
# transformers 5.24.0: a decoding loop given to generate() as a callable never gets the streamer that generate() was given, and nothing says so.
# Expected: custom_generate takes "a callable to run the decoding loop", so with transformers' own loop as that callable nothing changes.
# Seen: the streamer gets the prompt from generate() itself, then neither a token nor the end. (What was gathered for the loop, synced_gpus too, is
#   replaced by those arguments that the callable has and the usual loop has not.)
# Matters: text that should appear as it is made does not, and a reader who waits for the end of the stream waits for ever.
# Output:
#   usual loop: prompt and 4 tokens, end True
#   the same loop as custom_generate: prompt and 0 tokens, end False
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$dir/env/bin/python" -W ignore - <<'PYTHON'
import sys
import torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

class Recorder:
    def __init__(self):
        self.parts, self.ended = 0, False
    def put(self, value):
        self.parts += 1
    def end(self):
        self.ended = True

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
seen = {}
for name, options in {"usual loop": {}, "the same loop as custom_generate": {"custom_generate": GenerationMixin._sample}}.items():
    streamer = Recorder()
    made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False, streamer=streamer, **options)
    seen[name] = (streamer.parts - 1, streamer.ended)
    print(f"{name}: prompt and {streamer.parts - 1} tokens, end {streamer.ended}")
    assert made.shape == (1, 7)
if list(seen.values()) != [(4, True), (0, False)]:
    sys.exit("changed: a decoding loop given as custom_generate now gets the streamer, or the usual one does not.")
PYTHON
