#!/usr/bin/env bash
# transformers 5.24.0: a model read from GGUF has plain float32 weights, but counts as quantised: it cannot be saved, nor cast by .float().
# Expected: the file is converted on load (there is not one quantised tensor in this one), so the result is an ordinary model.
# Seen: save_pretrained, .float() and .half() raise ValueError; .double(), .bfloat16() and .to(dtype) work.
#   GgufConfig(dequantize=True) gives the ordinary model; nothing in the errors says so.
# Matters: GGUF is a common source of weights; a long job on such a model ends at its last line, save_pretrained.
# Output:
#   as loaded: torch.float32, counts as quantised: True, refuses: float half save_pretrained
#   with dequantize=True: torch.float32, counts as quantised: False, refuses: nothing
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$dir/env/bin/python" -W ignore - "$dir" <<'PYTHON'
import sys
import gguf
import numpy as np
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

logging.set_verbosity(logging.CRITICAL)
file = gguf.GGUFWriter(f"{sys.argv[1]}/tiny.gguf", "llama")
for key, value in {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64, "head_count": 4,
                   "head_count_kv": 4, "layer_norm_rms_eps": 1e-5, "vocab_size": 64}.items():
    getattr(file, f"add_{key}")(value)
for name, shape in {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
                    "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32),
                    "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}.items():
    file.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()


def refused(what, **more):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="tiny.gguf", **more)
    loaded_as, raised = f"{model.dtype}, counts as quantised: {getattr(model, 'is_quantized', False)}", []
    for use in (model.float, model.half, model.double, model.bfloat16, model.save_pretrained):
        try:
            use(f"{sys.argv[1]}/saved") if use == model.save_pretrained else use()
        except ValueError:
            raised.append(use.__name__)
    print(f"{what}: {loaded_as}, refuses:", *raised or ["nothing"])
    return raised


found, dequantised = refused("as loaded"), refused("with dequantize=True", quantization_config=GgufConfig(dequantize=True))
if found != ["float", "half", "save_pretrained"] or dequantised:
    sys.exit("changed: a model read from GGUF no longer refuses what is recorded here.")
PYTHON
