#!/usr/bin/env bash
# lm_eval 0.4.13: in rolling perplexity tasks a tokenizer that adds BOS gets it twice, and the second one is scored.
# Expected: BOS is context: the log-likelihood of a document is that of its own tokens after BOS.
# Seen: loglikelihood_rolling puts BOS in front as context and takes the tokenizer's ids, which begin with BOS, as what is to be predicted; so
#   log p(BOS | BOS) is added to every document. HFLM(add_bos_token=False) gives the expected figure.
# Matters: word and byte perplexity are worse by a constant for each document, for some tokenizers only: figures of different models, and of
#   other programs, cannot be compared.
# Output:
#   after BOS: -38.731, with a second BOS: -43.034, lm_eval: -43.034, with add_bos_token=False: -38.731
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 lm_eval==0.4.13
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - <<'PYTHON'
import sys
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
model = LlamaForCausalLM(config).eval()


@torch.no_grad()
def log_likelihood(ids):
    scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[i, token].item() for i, token in enumerate(ids[1:]))


def harness(**more):
    request = Instance("loglikelihood_rolling", {}, ("hello",), 0)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **more).loglikelihood_rolling([request])[0]


ids = tokenizer("hello")["input_ids"]  # with BOS
right, doubled = log_likelihood(ids), log_likelihood([0, *ids])
found, plain = harness(), harness(add_bos_token=False)
print(f"after BOS: {right:.3f}, with a second BOS: {doubled:.3f}, lm_eval: {found:.3f}, with add_bos_token=False: {plain:.3f}")
if abs(found - doubled) > 1e-3 or abs(plain - right) > 1e-3 or abs(doubled - right) < 1e-1:
    sys.exit("changed: lm_eval no longer scores BOS as recorded here.")
PYTHON
