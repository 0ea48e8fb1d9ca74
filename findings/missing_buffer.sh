#!/usr/bin/env bash
# transformers 5.24.0: a buffer that the checkpoint lacks is left as uninitialised memory, reported as "newly initialized".
# Expected: the buffer keeps what the module's __init__ gave it, as a missing nn.Linear weight gets its usual random start.
# Seen: modules are built without memory, so __init__'s values are gone; memory is then made for missing buffers, and only types of module that
#   transformers knows are filled. Buffers that are not saved at all (persistent=False) fare the same and are not even reported.
#   torch's deterministic mode fills uninitialised memory with NaN, which makes it visible here; else it holds whatever was there.
# Matters: scales and codebooks of quantised layers are buffers; a truncated checkpoint gives a model that differs from run to run.
# Output:
#   reported missing: ['gain']
#   gain [nan, nan], hidden [nan, nan] instead of [1.0, 1.0]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - "$dir/model" <<'PYTHON'
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.use_deterministic_algorithms(True)


class Scaled(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("gain", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.post_init()


folder = sys.argv[1]
Scaled(PreTrainedConfig()).save_pretrained(folder)
tensors = load_file(f"{folder}/model.safetensors")
save_file({name: tensor for name, tensor in tensors.items() if name != "gain"}, f"{folder}/model.safetensors", {"format": "pt"})
model, info = Scaled.from_pretrained(folder, output_loading_info=True)
print("reported missing:", sorted(info["missing_keys"]))
print(f"gain {model.gain.tolist()}, hidden {model.hidden.tolist()} instead of [1.0, 1.0]")
if not (model.gain.isnan().all() and model.hidden.isnan().all()) or info["missing_keys"] != {"gain"}:
    sys.exit("changed: buffers that a checkpoint lacks are no longer left uninitialised as recorded here.")
PYTHON
