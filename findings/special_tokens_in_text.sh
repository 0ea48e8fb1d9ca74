#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3: add_special_tokens=False does not keep special tokens out; the text's own spelling makes them.
# Expected: with add_special_tokens=False a text's letters "<unk>" are tokenised as letters.
# Seen: they become the special token <unk>, and decoding without special tokens loses them; only split_special_tokens=True spells them out.
# Matters: WikiText-2 is full of the letters "<unk>", so a perplexity on it depends on whether the tokenizer happens to have a token of that
#   name, and differs from that of programs that tokenise plain text as plain text. The same goes for calibration samples.
# Output:
#   default: 9 tokens, read back as 'the  sat'
#   add_special_tokens=False: 9 tokens, read back as 'the  sat'
#   split_special_tokens=True: 13 tokens, read back as 'the <unk> sat'
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile transformers==5.24.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -W ignore - <<'PYTHON'
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = ["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
text, special = "the <unk> sat", []
for name, options in (("default", {}), ("add_special_tokens=False", {"add_special_tokens": False}),
                      ("split_special_tokens=True", {"split_special_tokens": True})):
    ids = tokenizer(text, **options)["input_ids"]
    print(f"{name}: {len(ids)} tokens, read back as {tokenizer.decode(ids, skip_special_tokens=True)!r}")
    special.append(tokenizer.unk_token_id in ids)
if special != [True, True, False]:
    sys.exit("changed: special tokens spelled in a text are no longer treated as recorded here.")
PYTHON
