#!/usr/bin/env bash
# triton 3.7.1: in the interpreter (TRITON_INTERPRET=1) bfloat16 arithmetic gives wrong numbers and raises nothing.
# Expected: the same as on a GPU within rounding or, as the interpreter has no bfloat16, an error. Its documentation says to cast to float32.
# Seen: the operations work on the 16 bits as if they were integers: 1 + 1 is 1.7e38 and a product of matrices of ones is 4.2e9. Loads, stores
#   and casts are right, so a kernel that only moves data passes. float16 and float32 are right.
# Matters: tests of kernels run in the interpreter where there is no GPU; there a right kernel fails, for a reason that no message names.
# Output:
#   float32: 1 + 1 = 2, 16 times 1 * 1 = 16
#   float16: 1 + 1 = 2, 16 times 1 * 1 = 16
#   bfloat16: 1 + 1 = 1.70141e+38, 16 times 1 * 1 = 4.22812e+09
#   bfloat16, cast after the load: 1 + 1 = 2, 16 times 1 * 1 = 16
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > "$dir/kernel.py" <<'PYTHON'
import sys
import torch
import triton
import triton.language as tl


@triton.jit
def add_and_multiply(x, total, product, CAST: tl.constexpr):
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    ones = tl.load(x + square)
    if CAST:
        ones = ones.to(tl.float32)
    tl.store(total + square, ones + ones)
    tl.store(product + square, tl.dot(ones, ones))


right = []
for dtype, cast in ((torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)):
    total, product = torch.empty(16, 16, dtype=dtype), torch.empty(16, 16)
    add_and_multiply[(1,)](torch.ones(16, 16, dtype=dtype), total, product, cast)
    what = str(dtype).removeprefix("torch.") + (", cast after the load" if cast else "")
    print(f"{what}: 1 + 1 = {total[0, 0].item():g}, 16 times 1 * 1 = {product[0, 0].item():g}")
    right.append((total[0, 0].item(), product[0, 0].item()) == (2, 16))
if right != [True, True, False, True]:
    sys.exit("changed: bfloat16 in Triton's interpreter no longer behaves as recorded here.")
PYTHON
TRITON_INTERPRET=1 "$dir/env/bin/python" "$dir/kernel.py"
