#!/usr/bin/env bash
# transformers 5.5.0: a Gemma 3n or Gemma 4 whose last layers share keys and values computes other logits without a cache.
# Expected: use_cache=False changes what is kept for later calls, and no logits.
# Seen: with use_cache=False these layers use key and value projections of their own, which were never trained: the published model has them
#   and does not use them. Nothing is said. From 5.6.0 on the logits are the same.
# Matters: training, gradient checkpointing and most scripts that measure perplexity run without a cache: they train or measure another model.
# Output:
#   gemma3n_text 5.5.0: logits differ by 0.70 of the largest
#   gemma4_text 5.5.0: logits differ by 0.92 of the largest
#   gemma3n_text 5.6.0: logits differ by 0.00 of the largest
#   gemma4_text 5.6.0: logits differ by 0.00 of the largest
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
for version in 5.5.0 5.6.0; do
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==$version
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - $version <<'PYTHON'
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

common = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
              layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
              vocab_size_per_layer_input=64, max_position_embeddings=64, sliding_window=16, pad_token_id=0)
more = {"gemma3n_text": dict(laurel_rank=8, activation_sparsity_pattern=[0.0] * 4), "gemma4_text": dict(global_head_dim=8)}
for kind, own in more.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **own)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        tokens = torch.arange(5, 29)[None]
        with_cache, without = (model(input_ids=tokens, use_cache=cached).logits for cached in (True, False))
    apart = float((with_cache - without).abs().max() / with_cache.abs().max())
    print(f"{kind} {sys.argv[1]}: logits differ by {apart:.2f} of the largest")
    if (apart > 0.01) != (sys.argv[1] == "5.5.0"):
        sys.exit("changed: shared keys and values no longer depend on the cache as recorded here.")
PYTHON
done
