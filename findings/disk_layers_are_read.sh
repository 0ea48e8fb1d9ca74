#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0: from_pretrained reads and converts every weight that device_map leaves on disk.
# Expected: layers on "disk" stay in the safetensors file until they are called, as the load keeps no more of them than their names.
# Seen: each is read, cast to the dtype that was asked for, and thrown away; and as all of a file is mapped until the load ends, the process
#   grows by the whole file, and by a converted tensor, for a model of which a hundredth is kept.
# Matters: device_map="disk" is for models larger than memory. The load of one takes the time of reading all of it, once more than it is
#   needed, and looks in every monitor as if it did not fit (the mapped pages can be taken back; a limit on resident memory does not know).
# Output (bfloat16 file, float32 asked for):
#   file 621 MB, of which 8 MB in the model's own tensors; the process grew by more than the file
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
"$dir/env/bin/python" -W ignore - "$dir" 2> "$dir/errors" <<'PYTHON' || { tail -3 "$dir/errors"; exit 1; }
import subprocess
import sys

MAKE = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"vocab_size": 512, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
config = LlamaConfig(**sizes, num_hidden_layers=int(sys.argv[2]))
LlamaForCausalLM(config).bfloat16().save_pretrained(sys.argv[1])
"""
for layers in ("1", "6"):  # in processes of their own: this one's peak is looked at
    subprocess.run([sys.executable, "-c", MAKE, f"{sys.argv[1]}/{layers}", layers], check=True)

import os
import re

import torch
from transformers import AutoModelForCausalLM


def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])


def load(layers):
    place = f"{sys.argv[1]}/{layers}"
    kept = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places = kept | {"model.layers": "disk"}
    options = {"dtype": torch.float32, "device_map": places, "offload_folder": f"{place}-offloaded"}
    return AutoModelForCausalLM.from_pretrained(place, **options)


load(1)  # and with it the code
before = peak()
model = load(6)
grown, file = peak() - before, os.path.getsize(f"{sys.argv[1]}/6/model.safetensors")
kept = sum(tensor.nbytes for tensor in model.parameters() if tensor.device.type != "meta")
says = "more than the file" if grown > file else f"{grown / 1e6:.0f} MB"
print(f"file {file / 1e6:.0f} MB, of which {kept / 1e6:.0f} MB in the model's own tensors; the process grew by {says}")
if grown < file / 2:
    print("changed: what is left on disk is no longer read when a model is loaded.")
    sys.exit(1)
PYTHON
