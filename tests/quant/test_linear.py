"""Packed modules: what is stored, reading at every width, and the dense copy kept between calls."""

import copy
import pickle
import threading

import pytest
import torch

from compress.kernels import cpu
from compress.kernels.packing import unpack_planes
from compress.quant.embedding import BitPlaneEmbedding
from compress.quant.format import pack
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import PackedShape, first_bits

ROWS, COLUMNS, SEED, PARENT = 6, 45, 3, 6


def nested(seed=SEED, parent=PARENT):
    """Random parent codes and a table for every width."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**parent, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    tables = {bits: torch.randn(ROWS, 2**bits, generator=generator) for bits in range(seed, parent + 1)}
    return codes, tables


def build(kind, codes, tables, **options):
    """A module holding what pack() made of the codes."""
    shape, tensors = pack(codes, tables)
    module = kind(shape, **options)
    module.load_state_dict(tensors, strict=False)  # the bias is the caller's
    return module


def linear(bias=False):
    return build(BitPlaneLinear, *nested(), bias=bias)


def looked_up(codes, tables, bits):
    """The weight at one width, by definition, from tables as they are stored."""
    table = tables[bits].half().float()
    return torch.stack([table[row][(codes[row] >> (PARENT - bits)).long()] for row in range(len(codes))])


def inputs(*shape):
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(1))


# What is stored


def test_a_packed_matrix_is_seed_planes_further_planes_and_a_table_per_width():
    shape = PackedShape(out_features=6, in_features=45, seed_bits=3, parent_bits=5, codebook_dtype="float32")
    assert shape.specification() == {
        "weight": ((3, 6, 2), "int32"),
        "plane_4": ((6, 2), "int32"),
        "plane_5": ((6, 2), "int32"),
        "codebook_3": ((6, 8), "float32"),
        "codebook_4": ((6, 16), "float32"),
        "codebook_5": ((6, 32), "float32"),
    }


@pytest.mark.parametrize(("seed", "parent"), [(3, 6), (2, 8), (4, 4)])
def test_pack_makes_what_the_specification_says(seed, parent):
    codes, tables = nested(seed, parent)
    shape, tensors = pack(codes, tables)
    assert shape == PackedShape(ROWS, COLUMNS, seed, parent, "float16")
    made = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}
    assert made == shape.specification()
    planes = [*tensors["weight"], *(tensors[f"plane_{bits}"] for bits in range(seed + 1, parent + 1))]
    assert torch.equal(unpack_planes(planes, COLUMNS), codes)


@pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        (1.0, "float16"),
        (65504.0, "float16"),  # the largest float16
        (70000.0, "float32"),  # would be infinite
        (1e-6, "float16"),  # a float16 subnormal, but negligible beside the row's other entries
    ],
)
def test_tables_are_float16_if_every_entry_of_every_table_fits(entry, dtype):
    codes, tables = nested()
    tables[4][2, 5] = entry
    shape, tensors = pack(codes, tables)
    assert shape.codebook_dtype == dtype
    assert all(tensors[f"codebook_{bits}"].dtype == getattr(torch, dtype) for bits in tables)


def test_a_row_of_subnormal_entries_makes_all_tables_float32():
    codes, tables = nested()
    tables[3][1] = torch.arange(1, 9) * 1.3e-7
    shape, tensors = pack(codes, tables)
    assert shape.codebook_dtype == "float32"
    assert torch.equal(tensors["codebook_3"], tables[3])


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("model.layers.0.mlp.up_proj.plane_5", 5),
        ("codebook_3", 3),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("model.layers.0.mlp.up_proj.bias", None),
        ("plane_5.weight", None),
        ("plane_x", None),
    ],
)
def test_width_of_a_tensor_is_in_its_name(name, width):
    assert first_bits(name) == width


@pytest.mark.parametrize("kind", [BitPlaneLinear, BitPlaneEmbedding])
def test_a_modules_state_bears_the_specified_names(kind):
    shape = PackedShape(ROWS, COLUMNS, SEED, PARENT)
    options = {"bias": False} if kind is BitPlaneLinear else {}
    state = kind(shape, **options).state_dict()
    assert {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in state.items()
    } == shape.specification()


# Widths


@pytest.mark.parametrize("bits", range(SEED, PARENT + 1))
def test_a_width_read_from_the_parent_equals_a_matrix_packed_at_that_width(bits):
    codes, tables = nested()
    parent = linear()
    parent.bits = bits
    alone = build(BitPlaneLinear, codes >> (PARENT - bits), {bits: tables[bits]}, bias=False)
    x = inputs(4)
    assert torch.equal(parent(x), alone(x))
    assert torch.equal(parent.dense(), alone.dense())
    assert torch.equal(parent.dense(), looked_up(codes, tables, bits))


def test_a_module_starts_at_its_parents_width():
    assert linear().bits == PARENT


@pytest.mark.parametrize("bits", [2, 7, 0, "4"])
def test_a_width_that_is_not_held_is_refused(bits):
    module = linear()
    with pytest.raises(ValueError, match=rf"{bits} bits are not among the 3 to 6 held in memory"):
        module.bits = bits
    assert module.bits == PARENT


# The linear layer


def test_a_bias_is_added():
    with_bias, without = linear(bias=True), linear()
    torch.nn.init.normal_(with_bias.bias)
    x = inputs(2, 3)
    assert torch.equal(with_bias(x), without(x) + with_bias.bias)
    assert not with_bias.bias.requires_grad


def dense_linear():
    """One that keeps its looked-up weight."""
    module = linear()
    module.keep_dense = True
    return module


def test_the_dense_weight_is_kept_between_calls_only_if_wanted():
    module, x = dense_linear(), inputs(4)
    kept = module(x)
    assert torch.equal(module._dense[1], module.dense())
    first = module._dense
    module(x)
    assert module._dense is first

    lean = linear()
    lean.keep_dense = False
    torch.testing.assert_close(lean(x), kept)
    assert lean._dense is None


@pytest.mark.parametrize("built", [False, True])
def test_by_default_it_is_kept_only_where_nothing_multiplies_by_the_planes(monkeypatch, built):
    monkeypatch.setattr(cpu, "built", lambda: built)
    if built and isinstance(cpu.library(), str):
        pytest.skip(cpu.library())
    module = linear()
    module(inputs(4))
    module(inputs(4).requires_grad_())
    assert (module._dense is None) is built
    assert (module._prepared is not None) is built


def test_the_dense_weight_is_made_anew_for_another_width():
    codes, tables = nested()
    module, x = dense_linear(), inputs(4)
    module(x)
    module.bits = 4
    assert torch.equal(module(x), x @ looked_up(codes, tables, 4).T)


@pytest.mark.parametrize("place", [torch.device("cpu"), torch.float32])
def test_moving_a_module_drops_the_dense_weight(place):
    module = dense_linear()
    module(inputs(4))
    assert module.to(place)._dense is None


def test_the_dense_weight_follows_the_dtype_of_the_input():
    module, x = dense_linear(), inputs(4)
    module(x)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module._dense[1].dtype == torch.bfloat16


# What the C library is given


@pytest.mark.parametrize("exact", [False, True])
def test_a_copy_multiplies_by_its_own_tensors(exact):
    module, x = linear(), inputs(4)
    module.exact = exact
    before = module(x)
    twin, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for buffer in module.buffers():
        buffer.zero_()
    assert torch.equal(twin(x), before)
    assert torch.equal(pickled(x), before)


def test_buffers_put_in_place_of_others_take_effect():
    module, x = linear(), inputs(4)
    before = module(x)
    module._buffers["codebook_6"] = 2 * module.codebook_6  # as offloading does
    assert torch.equal(module(x), 2 * before)


def test_every_width_takes_effect_after_a_call():
    codes, tables = nested()
    module, x = linear(), inputs(4)
    for bits in (6, 3, 5, 4, 6):
        module.bits = bits
        torch.testing.assert_close(module(x), x @ looked_up(codes, tables, bits).T)


def test_a_cast_model_computes_in_its_own_type():
    module, x = linear(bias=True), inputs(4)
    torch.nn.init.normal_(module.bias)
    before = module(x)
    module.to(torch.bfloat16)
    after = module(x.bfloat16())
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before, rtol=0.02, atol=0.2)


def test_a_rounding_mode_is_near_the_exact_one_and_has_exact_gradients():
    if isinstance(cpu.library(), str):
        pytest.skip(cpu.library())
    module, x = linear(), inputs(4)
    expected = module(x)
    module.exact = False
    rounded = module(x)
    assert not torch.equal(rounded, expected)
    assert (rounded - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(module(x.requires_grad_()).detach(), expected)


def test_an_input_of_the_wrong_length_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        linear()(torch.zeros(2, COLUMNS + 1))


def test_new_tensors_take_effect_after_a_call():
    module, x = linear(), inputs(4)
    before = module(x)
    state = module.state_dict()
    module.load_state_dict({name: 2 * value if value.is_floating_point() else value for name, value in state.items()})
    assert torch.equal(module(x), 2 * before)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_an_input_can_be_trained_after_an_evaluation(guard, keep_dense):
    module = linear()
    module.keep_dense = keep_dense
    with guard():
        module(inputs(4))
    x = inputs(4).requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dense().sum(0).expand(4, -1))


@pytest.mark.slow
@pytest.mark.parametrize("keep_dense", [None, False, True])
def test_the_forward_pass_compiles_to_one_graph(keep_dense):
    torch.compiler.reset()  # recompilations are counted, for all instances together
    module = linear()
    module.keep_dense = keep_dense
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = inputs(4)
    for bits in module.shape.all_bits:
        module.bits = bits
        torch.testing.assert_close(compiled(x), module(x))


def test_exporting_and_tracing_keep_the_operator():
    module, x = linear(), inputs(4)
    module(x)
    exported = torch.export.export(module, (x,))
    assert any("packed_linear" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(2 * x), module(2 * x))
    torch.testing.assert_close(torch.jit.trace(module, (x,))(2 * x), module(2 * x))
    assert module._dense is None or module.keep_dense or not cpu.built()


# Threads


@pytest.mark.parametrize(("keep_dense", "exact"), [(None, True), (None, False), (True, True), (False, True)])
def test_a_layer_whose_bits_change_while_it_is_read_computes_at_one_of_them(keep_dense, exact):
    """Never at a mixture, never with an error, and afterwards at the bits that were set last."""
    module, x = linear(), inputs(2)
    module.keep_dense, module.exact = keep_dense, exact
    right = {}
    for bits in module.shape.all_bits:
        module.bits = bits
        with torch.no_grad():
            right[bits] = module(x)
    wrong, stop = [], threading.Event()

    def read():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    found = module(x)
                if not any(torch.equal(found, expected) for expected in right.values()):
                    wrong.append(found)
        except Exception as error:
            wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(400):
        module.bits = SEED + turn % len(right)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    for bits in module.shape.all_bits:
        module.bits = bits
        with torch.no_grad():
            assert torch.equal(module(x), right[bits])


@pytest.mark.parametrize("keep_dense", [None, True])
def test_what_a_slow_thread_leaves_behind_is_not_used_at_other_bits(monkeypatch, keep_dense):
    """One thread is held up while it makes what is kept between calls, and another changes the bits meanwhile."""
    module, x = linear(), inputs(2)
    module.keep_dense = keep_dense
    module.bits = 4
    right = module(x)
    module.bits = PARENT
    inside, go = threading.Event(), threading.Event()
    name = "dense" if keep_dense else "_key"
    slow = getattr(BitPlaneLinear, name)

    def held_up(self, *arguments):
        made = slow(self, *arguments)
        if threading.current_thread() is reader:
            inside.set()
            go.wait(20)
        return made

    monkeypatch.setattr(BitPlaneLinear, name, held_up)
    reader = threading.Thread(target=lambda: module(x))
    reader.start()
    assert inside.wait(20)
    module.bits = 4
    go.set()
    reader.join()
    torch.testing.assert_close(module(x), right, rtol=0, atol=0)


# The embedding


@pytest.mark.parametrize("bits", [SEED, 5, PARENT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_equals_indexing_its_dense_table(bits, dtype):
    codes, tables = nested()
    embedding = build(BitPlaneEmbedding, codes, tables, dtype=dtype)
    embedding.bits = bits
    tokens = torch.tensor([[0, 5, 2], [2, 2, 1]])
    assert torch.equal(embedding(tokens), looked_up(codes, tables, bits).to(dtype)[tokens])
