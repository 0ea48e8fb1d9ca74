#!/usr/bin/env bash
# transformers 5.24.0: the RoPE scaling that a GGUF file of a Llama names is dropped on load, and nothing says so.
# Expected: llama.rope.scaling.type = linear with factor 4 becomes rope_parameters of the config, as in the same model's own format.
# Seen: the config says rope_type "default", logits are bit for bit those of the same file without scaling; the architecture could do it, as
#   setting rope_parameters by hand shows.
# Matters: a model stretched to a longer context is wrong from the first position on, before any compression, and the loss goes to the method.
# Output:
#   unscaled file: {'rope_theta': 10000.0, 'rope_type': 'default'}
#   scaled file: {'rope_theta': 10000.0, 'rope_type': 'default'}
#   largest difference of logits: 0.0
#   with the scaling set by hand: 20.9
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$dir/env/bin/python" -W ignore - "$dir" <<'PYTHON'
import sys
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

names = {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
         "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32),
         "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}


def load(factor, **more):
    file = gguf.GGUFWriter(f"{sys.argv[1]}/tiny.gguf", "llama")
    for key, value in {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64, "head_count": 4,
                       "head_count_kv": 4, "layer_norm_rms_eps": 1e-5, "vocab_size": 64, "rope_freq_base": 10000.0}.items():
        getattr(file, f"add_{key}")(value)
    if factor != 1:
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(factor)
    random = np.random.default_rng(0)
    for name, shape in names.items():
        file.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="tiny.gguf", **more)
    return model.config.rope_parameters, model(input_ids=torch.tensor([[5, 9, 12, 3, 4, 5, 6]])).logits


wanted = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
(config, plain), (stretched, found), (_, right) = load(1), load(4.0), load(4.0, rope_parameters=wanted)
print(f"unscaled file: {config}\nscaled file: {stretched}\nlargest difference of logits: {(found - plain).abs().max().item()}")
print(f"with the scaling set by hand: {(right - plain).abs().max().item():.1f}")
if not torch.equal(found, plain) or torch.equal(right, plain):
    sys.exit("changed: the RoPE scaling of a GGUF file is no longer dropped as recorded here.")
PYTHON
