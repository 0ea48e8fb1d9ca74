#!/usr/bin/env bash
# transformers 5.24.0: an fp8 matrix whose last block of rows is smaller than the others is dequantised with the wrong scales, and nothing says so.
# Expected: with weight_block_size [128, 128] the two scales of 192 rows are those of rows 0 to 127 and 128 to 191, as in DeepSeek's own code and in
#   this release's fp8 kernels.
# Seen: on a machine without a GPU, where it dequantises on loading, the block's size is 192 / 2 = 96 rows: rows 96 to 127 get the other block's scale. (Where
#   rows do not divide by the number of scales, as the 576 rows of DeepSeek's kv_a_proj_with_mqa by 5, the load ends with an error.)
# Matters: the model computes with a part of its rows scaled by another block's factor.
# Output:
#   relative error of rows 0 to 95: 0.026, of rows 96 to 127: 0.987, of rows 128 to 191: 0.027
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$dir/env/bin/python" -W ignore - "$dir/model" <<'PYTHON'
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(0)
folder = Path(sys.argv[1])
config = Qwen3Config(vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, head_dim=64, tie_word_embeddings=False)
Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
tensors, name, size = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight", 128
weight = tensors[name].float() * torch.logspace(0, -3, 192)[:, None]  # rows of different size, so that blocks have different scales
scales = torch.stack([part.abs().amax().float() / 448 for part in weight.split(size)])[:, None]  # of rows 0 to 127, and 128 to 191
tensors[name] = torch.cat([part / scale for part, scale in zip(weight.split(size), scales)]).to(torch.float8_e4m3fn)
tensors[f"{name}_scale_inv"] = scales
others = [n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight") and n != name]
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
stored = json.loads((folder / "config.json").read_text())
stored["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [size, size],
                                 "modules_to_not_convert": [*others, "lm_head"]}
(folder / "config.json").write_text(json.dumps(stored))
found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_parameter(name)
apart = ((found - weight).norm(dim=1) / weight.norm(dim=1))
print(f"relative error of rows 0 to 95: {apart[:96].mean():.3f}, of rows 96 to 127: {apart[96:128].mean():.3f}, of rows 128 to 191: {apart[128:].mean():.3f}")
if not (apart[:96].max() < 0.1 < 0.5 < apart[96:128].min()):
    sys.exit("changed: the last block of an fp8 matrix is no longer read as recorded here.")
PYTHON
