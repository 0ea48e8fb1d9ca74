#!/usr/bin/env bash
# transformers 5.24.0: from_pretrained compiles a regular expression for every tensor of a checkpoint, also where no name changes.
# Expected: names that are in the file as the model has them are looked up.
# Seen: each gets a renaming of its own to the same name, whose patterns are made and compiled, and used for nothing; as Python keeps 512 patterns,
#   those of all other code are thrown out too, and the next load compiles all of them again.
# Matters: it is a good part of the time in which a small model with many tensors is loaded (a quantised one has several for each matrix), and grows
#   with their number, not with their size.
# Output:
#   1803 tensors, 0 renamed; patterns compiled: one or more for each
#   compiling as many takes more than a tenth of the load
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$dir/env/bin/python" -W ignore - "$dir/model" 2> "$dir/errors" <<'PYTHON' || { tail -3 "$dir/errors"; exit 1; }
import cProfile
import pstats
import re
import sys
import time

from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=200)).save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)  # and with it the code
with safe_open(f"{folder}/model.safetensors", "pt") as file:
    names = set(file.keys())

profile = cProfile.Profile()
re.purge()
profile.runcall(AutoModelForCausalLM.from_pretrained, folder)
calls = pstats.Stats(profile).stats.items()
compiled = sum(figures[1] for (file, _, name), figures in calls if name == "compile" and "re/_compiler" in file)
renamed = len(names - set(model.state_dict()))
each = "one or more for each" if compiled >= len(names) else compiled
print(f"{len(names)} tensors, {renamed} renamed; patterns compiled: {each}")

start = time.process_time()
AutoModelForCausalLM.from_pretrained(folder)
load = time.process_time() - start
re.purge()
start = time.process_time()
for name in names:
    re.compile(f"(?P<g0>^{re.escape(name)}" + r"(?!\w))")
share = (time.process_time() - start) / load
print(f"compiling as many takes {'more than a tenth' if share > 0.1 else f'{share:.0%}'} of the load")
if compiled < len(names):
    print("changed: names that stay are no longer compiled, one by one, into patterns.")
    sys.exit(1)
PYTHON
