"""A block computed by one call is the block computed module by module; whatever is not the same is left to the block's own class."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import compress
from compress import decoding
from compress.drafting import Decoding, Drafting
from compress.hf import cache_name, packed_modules
from compress.kernels import cpu
from compress.kernels.step import Steps
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import GroupedShape
from tests.conftest import NESTED

KINDS = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {"hidden_size": 80, "intermediate_size": 600, "head_dim": 16, "max_position_embeddings": 256}

pytestmark = pytest.mark.skipif(not cpu.built(), reason="the C library was not built")


@pytest.fixture
def load(make_packed):
    """Load a small packed model whose blocks are known."""

    def make(kind="llama", dtype=torch.float32, changes=None, passes=(NESTED,), **options):
        sizes = {**SIZES, **({"sliding_window": None} if kind == "mistral" else {}), **(changes or {})}
        return compress.load(make_packed(passes, kind, **sizes), dtype=dtype, **options)

    return make


@torch.no_grad()
def decoded(model, monkeypatch, joined, sizes=(20, 1, 1, 3, 1, 16, 2), batch=1, mask=None):
    """Return the logits of pieces of a text given one after the other, and how many blocks were computed by one call."""
    calls, own = [], decoding._step

    def counted(block, x, given):
        made = own(block, x, given) if joined else None
        calls.append(made is not None)
        return made

    monkeypatch.setattr(decoding, "_step", counted)
    tokens = torch.randint(300, (batch, sum(sizes)), generator=torch.Generator().manual_seed(0))
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        given = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        part = tokens[:, start : start + size]
        logits.append(model(input_ids=part, use_cache=True, **given, **{cache_name(model): cache}).logits)
        start += size
    monkeypatch.setattr(decoding, "_step", own)
    return torch.cat(logits, 1), sum(calls)


def assert_same(model, monkeypatch, bound=1e-5, **options):
    made, calls = decoded(model, monkeypatch, True, **options)
    expected, none = decoded(model, monkeypatch, False, **options)
    assert none == 0
    assert calls > 0
    assert (made - expected).norm() <= bound * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_the_same_at_any_bits(load, monkeypatch, kind):
    model = load(kind)
    for bits in (3, 4, 6):
        compress.set_bits(model, bits)
        assert_same(model, monkeypatch)


@pytest.mark.slow
def test_shared_codebooks_and_a_packed_vocabulary(load, monkeypatch):
    settings = {
        "kind": "any_precision",
        "seed_bits": 3,
        "parent_bits": 6,
        "codebooks": "shared",
        "embedding_bits": "auto",
    }
    assert_same(load(passes=[settings]), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batches_and_padding(load, monkeypatch, attention):
    model = load(attn_implementation=attention)
    mask = torch.ones(3, 44, dtype=torch.long)
    mask[0, :5] = mask[2, :11] = 0
    assert_same(model, monkeypatch, batch=3, sizes=(20, 1, 1, 3, 1), mask=mask)


def with_groups(module):
    """Give a layer with shared codebooks one coefficient per row, and a size for every group of columns."""
    shape, held = module.shape, dict(module.named_buffers())
    held = {name: tensor[:1] if name.startswith(("basis", "width")) else tensor for name, tensor in held.items()}
    held.pop("shapes", None)
    size = shape.out_features, -(-shape.in_features // 64)
    held["groups"] = torch.randint(100, 256, size, generator=torch.Generator().manual_seed(size[0])).byte()
    facts = shape.out_features, shape.in_features, shape.seed_bits, shape.parent_bits, shape.codebook_dtype
    bits = module.bits
    module.hold(GroupedShape(*facts, rank=1, group=64), held)
    module.bits = bits


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "bound"), [(True, 1e-5), (False, 2e-2)])
def test_groups_of_columns(load, monkeypatch, exact, bound):
    passes = [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 6, "codebooks": "shared"}]
    model = load(passes=passes, exact=exact)
    for name, module in packed_modules(model).items():
        if isinstance(module, BitPlaneLinear) and not name.endswith("q_proj"):  # not all products of one input alike
            with_groups(module)
    for bits in (3, 4, 6):
        compress.set_bits(model, bits)
        assert_same(model, monkeypatch, bound)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "key_heads", "channels"), [(2, 2, 96), (4, 2, 32), (6, 2, 64), (10, 1, 16), (5, 1, 80)]
)
def test_heads_that_share_keys_are_worked_at_together(load, monkeypatch, heads, key_heads, channels):
    """Up to four heads, whatever is left of them, and 64 channels, whatever is left of those."""
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": channels,
        "hidden_size": 16 * heads,
    }
    assert_same(load(changes=sizes), monkeypatch)
    assert_same(load(dtype=torch.bfloat16, changes=sizes), monkeypatch, 2e-2)


@pytest.mark.slow
def test_threads(load, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(load(), monkeypatch)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_bfloat16_is_nearer_to_float32(load, monkeypatch):
    exact, half = load(), load(dtype=torch.bfloat16)
    wanted, _ = decoded(exact, monkeypatch, False)
    made, calls = decoded(half, monkeypatch, True)
    own, _ = decoded(half, monkeypatch, False)
    assert calls > 0
    assert (made - wanted).norm() <= 1.1 * (own - wanted).norm()


@pytest.mark.slow
def test_rounded_activations_cost_as_much_either_way(load, monkeypatch):
    exact, rounded = load(), load(exact=False)
    wanted, _ = decoded(exact, monkeypatch, False)
    made, _ = decoded(rounded, monkeypatch, True)
    own, _ = decoded(rounded, monkeypatch, False)
    assert 0 < (made - wanted).norm() <= 1.5 * (own - wanted).norm()


@pytest.mark.slow
@torch.no_grad()
def test_generate_writes_the_same(load, monkeypatch):
    model, tokens = load(), torch.arange(5, 25)[None]
    options = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": False}
    made = model.generate(tokens, **options)
    beams = model.generate(tokens, num_beams=3, **options)
    monkeypatch.setattr(decoding, "_step", lambda *_: None)
    assert torch.equal(made, model.generate(tokens, **options))
    assert torch.equal(beams, model.generate(tokens, num_beams=3, **options))


@pytest.mark.slow
@torch.no_grad()
def test_caches_stay_apart(load):
    """A cache that was copied, or cropped, never sees what another goes on with."""
    model = load()
    name = cache_name(model)
    tokens = torch.arange(5, 35)[None]

    def read(cache, part):
        return model(input_ids=part, use_cache=True, **{name: cache}).logits

    first = DynamicCache(config=model.config)
    read(first, tokens[:, :20]), read(first, tokens[:, 20:21])
    second, third = copy.deepcopy(first), DynamicCache(config=model.config)
    for place, layer in enumerate(first.layers):
        third.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], place)
    expected = read(copy.deepcopy(first), tokens[:, 21:22])
    read(second, tokens[:, 25:26]), read(third, tokens[:, 26:27])
    assert torch.equal(read(first, tokens[:, 21:22]), expected)
    first.crop(-1)
    assert torch.equal(read(first, tokens[:, 21:22]), expected)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_not_the_same_is_left_alone(load, monkeypatch):
    model = load()
    seen = []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    _, calls = decoded(model, monkeypatch, True, sizes=(20, 1))
    assert (len(seen), calls) == (2, 2)  # of three blocks
    hook.remove()
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(80, 600, bias=False)
    _, calls = decoded(model, monkeypatch, True, sizes=(20, 1))
    assert calls == 2
    output = model(input_ids=torch.arange(5, 25)[None], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    with torch.enable_grad():
        assert model(input_ids=torch.arange(5, 8)[None]).logits.requires_grad


@pytest.mark.slow
def test_copies_and_pickles_go_on(load, monkeypatch):
    model = load()
    expected, _ = decoded(model, monkeypatch, True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made, calls = decoded(other, monkeypatch, True)
        assert calls > 0
        assert torch.allclose(made, expected, atol=1e-5)
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


@pytest.mark.slow
def test_heads_that_the_library_does_not_serve(load, monkeypatch):
    _, calls = decoded(load(changes={"head_dim": 12}), monkeypatch, True)
    assert calls == 0


@torch.no_grad()
def calls_of(model, monkeypatch, bound=1e-5):
    """Return how many blocks each call of the library computes for three tokens, one after the other, and check what they make."""
    counts, own = [], Steps.__call__

    def counted(steps, *rest):
        counts.append(len(steps.blocks))
        return own(steps, *rest)

    made, _ = decoded(model, monkeypatch, True, sizes=(20, 1, 1, 1))
    monkeypatch.setattr(Steps, "__call__", counted)
    again, _ = decoded(model, monkeypatch, True, sizes=(20, 1, 1, 1))
    monkeypatch.setattr(Steps, "__call__", own)
    wanted, _ = decoded(model, monkeypatch, False, sizes=(20, 1, 1, 1))
    assert torch.equal(made, again)
    assert (made - wanted).norm() <= bound * wanted.norm()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_all_its_blocks_by_one_call(load, monkeypatch, kind):
    model = load(kind)
    count = model.config.num_hidden_layers
    assert count > 1
    assert calls_of(model, monkeypatch) == [count] * 3
    assert calls_of(copy.deepcopy(model), monkeypatch) == [count] * 3
    assert calls_of(compress.view(model, bits=4), monkeypatch) == [count] * 3


def test_blocks_are_computed_one_by_one_where_somebody_looks_between(load, monkeypatch):
    model = load()
    count, blocks = model.config.num_hidden_layers, model.model.layers
    seen = []
    hook = blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    assert calls_of(model, monkeypatch) == [1] * 3 * count
    first = seen[1]  # of the first single token, by one call
    hook.remove()
    assert calls_of(model, monkeypatch) == [count] * 3
    with torch.no_grad():  # a block that is not called by the model computes itself
        cache = DynamicCache(config=model.config)
        tokens = torch.randint(300, (1, 23), generator=torch.Generator().manual_seed(0))
        model(input_ids=tokens[:, :20], use_cache=True, **{cache_name(model): cache})
        states = model.model(
            input_ids=tokens[:, 20:21], output_hidden_states=True, **{cache_name(model): cache}
        ).hidden_states
    assert (states[1] - first).norm() <= 1e-5 * first.norm()


def test_fewer_or_other_blocks_are_not_taken_for_the_old(load, monkeypatch):
    model = load()
    count, blocks = model.config.num_hidden_layers, model.model.layers
    calls_of(model, monkeypatch)
    model.config.num_hidden_layers = count - 1  # transformers then stops a block early
    assert calls_of(model, monkeypatch) == [1] * 3 * (count - 1)
    model.config.num_hidden_layers = count
    blocks[0], blocks[1] = blocks[1], blocks[0]
    for place, block in enumerate(blocks):
        block.self_attn.layer_idx = place
    assert calls_of(model, monkeypatch) == [count] * 3


@pytest.fixture
def shortened(monkeypatch):
    """Tell of every token whether it was computed past transformers' modules."""
    told, own = [], decoding.Short.__call__

    def noted(short, tokens):
        found = own(short, tokens)
        told.append(found is not None)
        return found

    monkeypatch.setattr(decoding.Short, "__call__", noted)
    return told


def written(model, seed=0, **options):
    torch.manual_seed(seed)
    prompt = torch.arange(5, 25)[None]
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_of_our_own_writes_what_transformers_does(load, shortened, kind, dtype):
    model = load(kind, dtype)
    for options in (
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.9, "top_k": 40},
    ):
        shortened.clear()
        made = written(model, custom_generate=Decoding(), **options)
        assert shortened == [False] + [True] * 11  # the prompt, then tokens
        assert torch.equal(made, written(model, **options))


class Switch:
    """A streamer that changes the number of bits in the middle of a text."""

    def __init__(self, model):
        self.model, self.seen = model, 0

    def put(self, tokens):
        self.seen += 1
        if self.seen == 6:
            compress.set_bits(self.model, 3)

    def end(self):
        compress.set_bits(self.model, 6)


@pytest.mark.slow
def test_bits_that_change_in_the_middle_of_a_text(load, shortened):
    model = load()
    made = written(model, do_sample=False, custom_generate=Decoding(streamer=Switch(model)))
    assert sum(shortened) == 11
    assert torch.equal(made, written(model, do_sample=False, streamer=Switch(model)))
    assert not torch.equal(made, written(model, do_sample=False))


@pytest.mark.slow
def test_transformers_computes_where_somebody_looks_or_the_cache_is_another(load, shortened):
    model = load()
    packed = {cache_name(model): compress.KVCache(4, residual=8, group=8, config=model.config)}
    wanted = written(model, do_sample=False, **copy.deepcopy(packed))
    assert torch.equal(written(model, do_sample=False, custom_generate=Decoding(), **packed), wanted)
    wanted, seen = written(model, do_sample=False), []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(written(model, do_sample=False, custom_generate=Decoding()), wanted)
    hook.remove()
    assert len(seen) == 12
    assert not any(shortened)


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [False, True])
def test_loops_go_on_with_the_packed_cache_that_a_model_makes(load, drafted):
    model = load(kv={"bits": 8, "residual": 4, "group": 8})
    loop = Drafting(compress.view(model, bits=3), tokens=2) if drafted else Decoding()
    wanted, read = written(model, do_sample=False), []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(written(model, do_sample=False, custom_generate=loop), wanted)
    hook.remove()
    assert read[0] == 20
    assert max(read[1:]) <= 3  # what is new, not all of it again
