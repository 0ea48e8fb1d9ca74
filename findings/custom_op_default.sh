#!/usr/bin/env bash
# torch 2.13.0, torch.library: the backward of an operator with a list of tensors breaks for calls whose last argument has its default value.
# Expected: setup_context sees three inputs, so the backward returns three gradients, whatever the call passed.
# Seen: trailing arguments that equal their defaults are taken off before autograd, also where the caller wrote them, yet setup_context still
#   gets all three. With a tensor list among the inputs the gradients' structure is then compared with the shortened call's, and backward
#   raises. The same operator without a list is right, and so is a call with another value, which is what tests tend to pass.
# Matters: an optional argument at the end (a bias, a cached weight) makes training fail in the plainest use.
# Output:
#   list, default left out: RuntimeError: Expected the return from backward to be of the same structure as the inputs
#   list, default written: RuntimeError: Expected the return from backward to be of the same structure as the inputs
#   list, another value: right
#   no list, default left out: right
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" - <<'PYTHON'
import sys
import torch
from torch import Tensor


@torch.library.custom_op("demo::listed", mutates_args=())
def listed(x: Tensor, weights: list[Tensor], scale: float = 1.0) -> Tensor:
    return x @ weights[0] * scale


@torch.library.custom_op("demo::single", mutates_args=())
def single(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    return x @ weight * scale


# Each backward returns three gradients (made-up ones: only their structure is compared): of x, of the weights, of the scale.
listed.register_autograd(lambda ctx, above: (torch.ones(2, 3), [None], None), setup_context=lambda ctx, inputs, output: None)
single.register_autograd(lambda ctx, above: (torch.ones(2, 3), None, None), setup_context=lambda ctx, inputs, output: None)
x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4)
calls = {"list, default left out": (listed, [weight]), "list, default written": (listed, [weight], 1.0),
         "list, another value": (listed, [weight], 2.0), "no list, default left out": (single, weight)}
raised = []
for name, (operator, *arguments) in calls.items():
    try:
        operator(x, *arguments).sum().backward()
        print(f"{name}: right")
    except RuntimeError as error:
        print(f"{name}: RuntimeError: {str(error).split('.')[0]}")
        raised.append(name)
if raised != list(calls)[:2]:
    sys.exit("changed: defaults at the end no longer break the backward of an operator with a list of tensors as recorded here.")
PYTHON
