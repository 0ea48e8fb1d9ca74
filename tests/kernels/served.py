"""Runs in a process with TRITON_INTERPRET=1: a loaded checkpoint on the kernels, end to end, as it would be on a GPU."""

import copy
import sys

import torch

import compress
from compress.hf import packed_modules
from compress.kernels import gpu
from compress.kernels.layout import rounded
from compress.quant.linear import BitPlaneLinear

folder, saved = sys.argv[1:]
tokens = torch.arange(12).view(2, 6)


def linears(model):
    return [module for module in packed_modules(model).values() if isinstance(module, BitPlaneLinear)]


def logits(model, bits):
    compress.set_bits(model, bits)
    with torch.no_grad():
        return model(tokens).logits


model = compress.load(folder, dtype=torch.float32)
assert all(module.is_tiled for module in linears(model))
stored = compress.load(folder, dtype=torch.float32)
for module in linears(stored):
    module.untile()
assert not any(module.is_tiled for module in linears(stored))

before = [buffer.data_ptr() for buffer in model.buffers()]
for bits in (3, 4, 6):
    assert torch.allclose(logits(model, bits), logits(stored, bits), rtol=1e-4, atol=1e-4)
    assert torch.allclose(linears(model)[0].dense(), linears(stored)[0].dense())
assert [buffer.data_ptr() for buffer in model.buffers()] == before
print("every width, and a change of the width moves nothing: ok")

first, second = model.state_dict(), stored.state_dict()
assert first.keys() == second.keys()
assert all(torch.equal(first[name], second[name]) for name in second)
model.save_pretrained(saved)
again = compress.load(saved, dtype=torch.float32)
assert torch.equal(logits(again, 6), logits(model, 6))
model.load_state_dict(second)
assert all(module.is_tiled for module in linears(model))
assert torch.equal(logits(copy.deepcopy(model).to(torch.float64).to(torch.float32), 6), logits(again, 6))
print("state, saving and loading: ok")

prompt = model.get_input_embeddings()(tokens).detach().requires_grad_()
model(inputs_embeds=prompt).logits.sum().backward()
other = prompt.detach().clone().requires_grad_()
stored(inputs_embeds=other).logits.sum().backward()
assert torch.allclose(prompt.grad, other.grad, rtol=1e-3, atol=1e-4)
print("gradient to the input: ok")

linear = linears(model)[0]
x = torch.randn(2, linear.in_features)
y = linear(x)
linear.keep_dense = True
assert torch.allclose(linear(x), y, rtol=1e-4, atol=1e-5)
linear.keep_dense = None
print("a kept dense weight: ok")

step = torch.compile(model, fullgraph=True, backend="eager")  # no graph breaks
with torch.no_grad():
    assert torch.allclose(step(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
print("compiled as one graph: ok")

calls = []
launch = gpu.multiply
gpu.multiply = lambda x, packed, *rest: calls.append(packed.rows) or launch(x, packed, *rest)
fresh = compress.load(folder, dtype=torch.float32)
result = logits(fresh, 4)
assert calls[:4] == [128, 64, 192, 64]  # query, key and value; output; gate and up; down
assert torch.allclose(result, logits(stored, 4), rtol=1e-4, atol=1e-4)
calls.clear()
compress.set_bits(fresh, {"re:.*k_proj": 3})  # widths that differ: each its own
mixed = fresh(tokens).logits
assert calls[:4] == [64, 32, 32, 64]
compress.set_bits(stored, {"re:.*k_proj": 3})
assert torch.allclose(mixed, stored(tokens).logits, rtol=1e-4, atol=1e-4)
bytes_before = sum(buffer.nbytes for buffer in fresh.buffers())
assert all(module._group is None for module in linears(copy.deepcopy(fresh)))
fresh.to(torch.float32)  # whatever moves them parts them
assert all(module._group is None for module in linears(fresh))
assert sum(buffer.nbytes for buffer in fresh.buffers()) == bytes_before
compress.set_bits(fresh, 4)
assert torch.equal(logits(fresh, 4), result)
print("layers of one input are launched together: ok")

calls.clear()
fast = compress.load(folder, dtype=torch.float32, exact=False)
found = logits(fast, 4)
assert calls[:4] == [128, 64, 192, 64]  # still together
assert torch.equal(logits(fast, 3), logits(fresh, 3))  # at width 4 alone
assert not torch.allclose(found, result, rtol=1e-4, atol=1e-4)
assert all(torch.equal(tensor, second[name]) for name, tensor in fast.state_dict().items())
compress.set_bits(stored, 4)
for module in linears(stored):
    entries = rounded(module.codebook())
    if module.factors is None:
        module.register_buffer("codebook_4", entries)
    module._table = module._key(4, None), entries
with torch.no_grad():
    assert torch.allclose(found, stored(tokens).logits, rtol=1e-4, atol=1e-4)
for module in linears(fast):
    module.exact = True
assert torch.equal(logits(fast, 4), result)
print("entries of 8 bits: ok")
