"""The packed cache of keys and values in stock models of transformers."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import compress
from compress import CompressError, KVCache
from compress.hf import cache_name
from compress.kernels.kv import unpack
from compress.kernels.kv_mean import turn as turned
from compress.kv import KVLayer, LazyStates
from compress.kv_evict import importance, kept_tokens
from compress.kv_settings import KVSettings, kv_label, parse_kv_bits
from compress.models import rotary_frequencies
from tests import zoo

SIZES = {
    "vocab_size": 300, "bos_token_id": 0, "eos_token_id": None, "hidden_size": 64, "intermediate_size": 100,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
SMALL = {"group": 8, "residual": 16}


def model_of(kind="llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def ids_of(rows=2, tokens=50):
    return torch.randint(1, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


def made_dense(monkeypatch):
    """Count how often packed states became dense."""
    counted = []
    dense = LazyStates.dense

    def counting(self):
        if self.states.keys.tokens:
            counted.append(1)
        return dense(self)

    monkeypatch.setattr(LazyStates, "dense", counting)
    return counted


@torch.no_grad()
def logits_by_blocks(model, ids, cache, size=7, mask=None):
    found = []
    for start in range(0, ids.shape[1], size):
        seen = None if mask is None else mask[:, : start + size]
        given = {cache_name(model): cache, "attention_mask": seen}
        out = model(ids[:, start : start + size], use_cache=True, **given)
        found.append(out.logits)
    return torch.cat(found, 1)


KINDS = {"llama": {}, "gemma3_text": {"sliding_window": 24}, "mistral": {"sliding_window": 20}, "qwen3": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_with_left_padding_are_near_the_plain_cache_and_never_dense(kind, monkeypatch):
    model, ids = model_of(kind, **KINDS[kind]), ids_of(tokens=90)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    counted = made_dense(monkeypatch)
    plain = logits_by_blocks(model, ids, DynamicCache(config=model.config), mask=mask)
    found = logits_by_blocks(model, ids, KVCache(8, **SMALL, config=model.config), mask=mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], plain[real], rtol=0, atol=0.02 * float(plain.abs().max()))
    assert not counted


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_whole_cache_is_the_plain_one(kind):
    model, ids = model_of(kind, **KINDS[kind]), ids_of(tokens=60)
    plain = logits_by_blocks(model, ids, DynamicCache(config=model.config))
    found = logits_by_blocks(model, ids, KVCache(16, **SMALL, config=model.config))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_attention_that_is_not_torchs_gets_dense_states(kind, monkeypatch):
    model, ids = model_of(kind, **KINDS[kind]), ids_of(tokens=60)
    options = {
        **SMALL,
        "scale_keys": False,
        "config": model.config,
    }  # factors depend on queries, which other attention does not show
    lazy = logits_by_blocks(model, ids, KVCache(4, **options))
    model.set_attn_implementation("eager")
    counted = made_dense(monkeypatch)
    eager = logits_by_blocks(model, ids, KVCache(4, **options))
    torch.testing.assert_close(eager, lazy, rtol=1e-3, atol=1e-4)
    assert counted


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [7, 60])
def test_keys_are_scaled_once_by_what_the_first_tokens_show(implementation, size):
    model, ids = model_of("gemma3_text", sliding_window=24), ids_of(tokens=60)
    model.set_attn_implementation(implementation)
    cache = KVCache(4, **SMALL, config=model.config)
    logits_by_blocks(model, ids, cache, size)
    logits_by_blocks(model, ids[:, :9], cache)
    for layer in cache.layers:
        assert layer.power is None
        assert layer.scale.shape == (2, 2, 1, 16)
        torch.testing.assert_close(layer.scale.log().mean(-1), torch.zeros(2, 2, 1), rtol=0, atol=1e-5)
        assert torch.equal(layer.packed[0].scale, layer.scale)
        assert layer.packed[1].scale is None


@pytest.mark.parametrize("window", [None, 40])
def test_keys_are_packed_less_their_mean_wherever_they_are(window):
    """Keys of a large mean come back at 8 bits, in windows that lose tokens and behind a crop; without it they are further off."""
    frequencies = rotary_frequencies(AutoConfig.for_model("llama", **SIZES), 0)
    noise = torch.randn(2, 2, 150, 16, generator=torch.Generator().manual_seed(0))
    keys = turned(torch.full((2, 2, 1, 16), 20.0), torch.arange(150), frequencies) + noise
    errors = []
    for centre in (True, False):
        layer = KVLayer(KVSettings(8, 16, centre_keys=centre), (8, 8), window, frequencies)
        for start in range(0, 150, 10):
            if start == 100 and window is None:
                layer.crop(-30)
                layer.update(keys[:, :, 70:100], keys[:, :, 70:100])
            part = keys[:, :, start : start + 10]
            found, _ = layer.update(part, part)
        dense = found.dense()
        errors.append(float((dense - keys[:, :, -dense.shape[2] :]).abs().max()))
        assert (layer.mean is not None) == centre
    assert errors[0] < 0.02 < 0.05 < errors[1]


def test_keys_are_not_centred_where_places_are_not_known():
    model, ids = model_of(), ids_of(tokens=60)
    without = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=300)
    )
    for network, cache in (
        (model, KVCache(4, **SMALL, keep=40, config=model.config)),
        (model, KVCache(4, **SMALL)),
        (without.eval(), KVCache(4, **SMALL, config=without.config)),
    ):
        with torch.no_grad():
            network(ids, use_cache=True, **{cache_name(network): cache})
        assert all(layer.mean is None and layer.scale is not None for layer in cache.layers)


@pytest.mark.slow
def test_generate_with_beams_sampling_and_several_sequences():
    model, ids = model_of(), ids_of()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        cache = KVCache(8, **SMALL, config=model.config)
        found = model.generate(ids, **{cache_name(model): cache}, **options, **more)
        plain = model.generate(ids, **options, **more)
        assert found.shape == plain.shape
        assert (found == plain).float().mean() > 0.9
        assert cache.get_seq_length() == ids.shape[1] + 19


def test_rows_follow_beams_and_selections():
    model, ids = model_of(), ids_of(rows=3)
    cache = KVCache(4, **SMALL, config=model.config)
    logits_by_blocks(model, ids, cache)
    before = [unpack(layer.packed[0]) for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 5]))
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(unpack(layer.packed[0]), keys[[2, 0]])
        assert layer.whole[1].shape[0] == 2


@pytest.mark.slow
def test_cropped_tokens_are_forgotten():
    model, ids = model_of(), ids_of(tokens=60)
    for away in (0, 3, 25, 41, 57, 60):
        cache = KVCache(8, **SMALL, config=model.config)
        logits_by_blocks(model, ids, cache)
        cache.crop(-away)
        assert cache.get_seq_length() == cache.layers[0].held == 60 - away
        again = logits_by_blocks(model, ids[:, 60 - away :], cache) if away else None
        if again is not None:
            plain = logits_by_blocks(model, ids, DynamicCache(config=model.config))[:, 60 - away :]
            torch.testing.assert_close(again, plain, rtol=0, atol=0.03 * float(plain.abs().max()))


def test_a_sliding_window_is_cropped_only_while_it_keeps_the_past():
    model, ids = model_of("mistral", sliding_window=20), ids_of(tokens=60)
    cache = KVCache(8, **SMALL, config=model.config)
    logits_by_blocks(model, ids, cache)
    assert cache.layers[0].held < 20 + 8
    with pytest.raises(CompressError, match="activate_past_recording"):
        cache.crop(-30)
    cache.activate_past_recording()
    logits_by_blocks(model, ids[:, :10], cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 60
    assert cache.layers[0].held < 20 + 8


def test_a_sliding_window_drops_the_first_tokens_and_then_groups():
    """What is held depends on how many tokens were seen alone, whether they are packed or whole."""
    config = model_of("mistral", sliding_window=40).config
    packed, whole = (KVCache(bits, **SMALL, sinks=3, config=config) for bits in (4, 16))
    states = torch.randn(1, 2, 120, 16)
    for token in range(120):
        for cache in (packed, whole):
            new = states[:, :, token : token + 1]
            cache.update(new, new, 0)
        layers = packed.layers[0], whole.layers[0]
        lost = 3 + (token + 1 - 39 - 3) // 8 * 8 if token + 1 - 39 >= 3 else 0
        assert [token + 1 - layer.held for layer in layers] == [lost, lost]
    held = unpack(packed.layers[0].packed[0])
    torch.testing.assert_close(held, states[:, :, lost : lost + held.shape[2]], rtol=0, atol=0.5)


def test_assisted_decoding_gives_the_same_tokens():
    model, ids = model_of(), ids_of(rows=1)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    found = []
    for more in ({"prompt_lookup_num_tokens": 3}, {}):
        cache = KVCache(8, **SMALL, config=model.config)
        found.append(model.generate(ids, **{cache_name(model): cache}, **options, **more))
    assert torch.equal(*found)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("bits", [(4, 2), (8, 3), (3, 2), (16, 2)])
def test_fewer_bits_in_the_middle_are_those_bits_from_the_start(bits, shown):
    """The same keys and values in both, and queries: bit for bit, those packed later too; and the freed planes are gone."""
    most, fewest = bits
    generator = torch.Generator().manual_seed(0)
    live, wanted = KVCache(most, **SMALL), KVCache(fewest, **SMALL)
    for turn in range(6):
        query, keys, values = (torch.randn(2, 2, 17, 16, generator=generator) for _ in range(3))
        for cache in (live, wanted):
            states = cache.update(keys, values, 0)
            if shown:
                scaled_dot_product_attention(query, *states)
        if turn == 3:
            before = live.resident_bytes()
            live.set_bits(fewest)
            assert live.resident_bytes() < before
    for one, other in zip(live.layers[0].tensors(), wanted.layers[0].tensors(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CompressError, match="not kept"):
        live.set_bits(8)


def test_bytes_in_memory_are_those_of_the_planes_groups_and_whole_tokens():
    cache = KVCache((4, 2), **SMALL, sinks=3)
    states = torch.randn(1, 3, 3 + 16 + 64, 32)
    scaled_dot_product_attention(states, *cache.update(states, states, 0))  # which shows the queries
    values = 3 * 64 * 32
    groups = values // 8 * (4 + 1)  # smallest values and spans of keys, in float16, and a byte for the span of values
    assert cache.resident_bytes() == values * (4 + 2) // 8 + groups + 2 * 3 * (3 + 16) * 32 * 4 + 3 * 32 * 4


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_token_beyond_the_whole_ones_takes_little_more_than_its_bits(bits, channels):
    sizes, whole = [], 4 + 128
    for groups in (2, 6):
        cache = KVCache(bits)
        states = torch.randn(1, 2, whole + 128 * groups, channels, dtype=torch.bfloat16)
        scaled_dot_product_attention(states, *cache.update(states, states, 0))
        sizes.append(cache.resident_bytes())
    plain = 2 * 2 * channels * 2  # bytes of a token in bfloat16
    assert (sizes[1] - sizes[0]) / (4 * 128 * plain) <= 1.1 * bits / 16


def test_a_copy_is_a_cache_of_its_own():
    model, ids = model_of(), ids_of(tokens=40)
    cache = KVCache(4, **SMALL, config=model.config)
    logits_by_blocks(model, ids, cache)
    other = copy.deepcopy(cache)
    logits_by_blocks(model, ids, other)
    assert (cache.get_seq_length(), other.get_seq_length()) == (40, 80)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.resident_bytes() == 0


def test_lazy_states_are_tensors_to_whatever_asks():
    cache = KVCache(4, **SMALL)
    states = torch.randn(1, 2, 40, 16)
    cache.update(states, states, 0)
    keys, values = cache.update(states[:, :, :1], states[:, :, :1], 0)
    assert isinstance(keys, LazyStates)
    assert keys.shape == (1, 2, 41, 16)
    assert torch.equal(keys + 0, keys.dense())
    assert torch.equal(keys[:, :, :5], keys.dense()[:, :, :5])
    repeated = keys[:, :, None, :, :].expand(1, 2, 3, 41, 16).reshape(1, 6, 41, 16)
    assert isinstance(repeated, LazyStates)
    assert torch.equal(repeated.clone(), keys.dense().repeat_interleave(3, 1))
    query = torch.randn(1, 2, 1, 16)
    found = scaled_dot_product_attention(query, keys, values)
    wanted = scaled_dot_product_attention(query, keys.dense(), values.dense())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    causal = scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(
        causal, scaled_dot_product_attention(query, keys.dense(), values.dense(), is_causal=True)
    )


def test_layers_may_differ():
    model, ids = model_of(), ids_of()
    cache = KVCache([2, (4, 3), 16], **SMALL, config=model.config)
    logits_by_blocks(model, ids, cache)
    assert [layer.bits for layer in cache.layers] == [(2, 2), (4, 3), (16, 16)]
    assert cache.layers[2].packed is None


def test_hybrid_models_pack_what_keeps_keys_and_values():
    config = AutoConfig.for_model(
        "qwen3_next", layer_types=["linear_attention", "full_attention"], num_hidden_layers=2, head_dim=16
    )
    if any(type(layer).__name__ == "DynamicLayer" for layer in DynamicCache(config=config).layers[:1]):
        pytest.skip("this transformers has no cache layers of linear attention")
    cache = KVCache(4, group=16, config=config)
    assert [isinstance(layer, KVLayer) for layer in cache.layers] == [False, True]


def test_blocks_with_different_numbers_of_heads_are_packed():
    cache = KVCache(4, group=8, config=zoo.tiny_config("dots3_note_text"))
    assert {type(layer) for layer in cache.layers} >= {KVLayer}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "give 2 to 8"),
        ({"bits": (4, 2, 2)}, "give 2 to 8"),
        ({"bits": (16, 2)}, "keys and values apart"),
        ({"bits": [4]}, "1 entries for a model of 3 layers"),
        ({"group": 24}, r"does not divide the 16 channels .* 16 say"),
        ({"group": 0}, "at least one value"),
        ({"residual": -1}, "is negative"),
        ({"sinks": -1}, "is negative"),
        ({"keys": "head"}, "give 'channel' or 'token'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(options, message):
    with pytest.raises(CompressError, match=message):
        KVCache(**{**SMALL, **options}, config=model_of().config)


def test_without_a_config_channels_are_checked_at_the_first_token():
    with pytest.raises(CompressError, match="does not divide the 12 channels"):
        KVCache(4, group=8).update(torch.zeros(1, 1, 1, 12), torch.zeros(1, 1, 1, 12), 0)


def test_groups_that_nobody_gives_fit_the_heads():
    cache = KVCache(4)
    cache.update(torch.zeros(1, 1, 1, 80), torch.zeros(1, 1, 1, 96), 0)
    assert cache.layers[0].settings.groups == (128, 48)
    cache = KVCache(4, keys="token", values="channel")
    cache.update(torch.zeros(1, 1, 1, 80), torch.zeros(1, 1, 1, 96), 0)
    assert cache.layers[0].settings.groups == (40, 128)


def test_a_model_without_attention_is_refused():
    config = AutoConfig.for_model("mamba", num_hidden_layers=2, hidden_size=32, state_size=4)
    with pytest.raises(CompressError, match="nothing to pack"):
        KVCache(4, config=config)


def test_bits_of_a_command_line():
    assert parse_kv_bits("4,2,4:2") == [4, 2, (4, 2)]
    assert parse_kv_bits(None) == []
    assert [kv_label(bits) for bits in (4, (4, 2), [4, 2])] == ["4", "4:2", "mixed"]
    for wrong in ("four", "1", "4:2:2", "4,"):
        with pytest.raises(CompressError, match="kv"):
            parse_kv_bits(wrong)


def test_a_packed_checkpoint_and_a_packed_cache_go_together(compressed):
    model = compress.load(compressed, bits=4)
    cache = KVCache(4, group=(8, 12), residual=8, config=model.config)
    ids = ids_of(rows=1, tokens=30)
    out = model.generate(ids, **{cache_name(model): cache}, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 30
    assert cache.layers[0].packed is not None


def test_a_model_loaded_with_kv_packs_what_it_caches(compressed):
    plain, packed = (
        compress.load(compressed, bits=4),
        compress.load(compressed, bits=4, kv={"bits": 8, "group": 4, "residual": 8}),
    )
    ids = ids_of(rows=1, tokens=30)
    out = packed(ids)
    found = getattr(out, cache_name(packed))
    assert isinstance(found, KVCache)
    assert found.layers[0].packed is not None
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    made = packed.generate(ids, **options)
    assert isinstance(getattr(made, cache_name(packed)), KVCache)
    assert torch.equal(made.sequences, plain.generate(ids, **options).sequences)
    begun = getattr(plain(ids), cache_name(plain))  # a prefix, say
    moved = getattr(packed(ids[:, :5], **{cache_name(packed): begun}), cache_name(packed))
    assert isinstance(moved, KVCache)
    assert moved.get_seq_length() == 35
    assert getattr(packed(ids, use_cache=False), cache_name(packed)) is None


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("recommended", "recommends no setting"),
        ("4,2", "give one number"),
        ("x", "numbers of bits"),
        (9, "give 2 to 8"),
        ({"bits": 4, "grup": 3}, "'grup' is not a known setting"),
        ({"bits": 4, "group": 32}, "does not divide the 12 channels"),
    ],
)
def test_load_refuses_a_cache_before_it_reads_the_model(compressed, kv, message):
    with pytest.raises(CompressError, match=message):
        compress.load(compressed, kv=kv)


@pytest.mark.parametrize("policy", ["attention", "recent", "random"])
def test_a_prompt_is_thinned_out_and_goes_on(policy):
    model, ids = model_of(), ids_of(rows=2, tokens=90)
    cache = KVCache(8, **SMALL, keep=40, policy=policy, config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        found = model(ids, use_cache=True, **{cache_name(model): cache}).logits
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)  # the prompt still sees itself whole
    assert [layer.held for layer in cache.layers] == [40] * 3
    assert cache.get_seq_length() == 90
    logits_by_blocks(model, ids[:, :5], cache)
    assert (cache.layers[0].held, cache.get_seq_length()) == (45, 95)
    cache = KVCache(8, **SMALL, keep=40, policy=policy, config=model.config)
    made = model.generate(ids, **{cache_name(model): cache}, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 94)


def test_what_stays_is_what_the_last_queries_attend_to():
    keys, query = torch.zeros(1, 1, 50, 8), torch.zeros(1, 2, 50, 8)
    keys[0, 0, [7, 20], 3] = 9.0
    query[..., 3] = 1.0
    scores = importance("attention", query, keys, 1.0)
    assert kept_tokens(scores, 12, 2, 8)[0, 0].tolist() == [0, 1, 7, 20, *range(42, 50)]
    assert kept_tokens(importance("recent", query, keys, 1.0), 12, 2, 8)[0, 0].tolist() == [0, 1, *range(40, 50)]
    plain = (query[:, :, -32:] @ keys.repeat_interleave(2, 1).mT).masked_fill(
        torch.arange(50) > torch.arange(18, 50)[:, None], -torch.inf
    )
    torch.testing.assert_close(scores, plain.softmax(-1).sum((1, 2))[:, None])


def test_what_cannot_be_thinned_out_is_refused():
    model, ids = model_of(), ids_of(rows=2, tokens=60)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    name = cache_name(model)
    with pytest.raises(CompressError, match="without padding"):
        model(ids, attention_mask=mask, **{name: KVCache(8, **SMALL, keep=40, config=model.config)})
    with pytest.raises(CompressError, match="fewer tokens than stay whole"):
        KVCache(8, **SMALL, keep=10)
    with pytest.raises(CompressError, match="'attention', 'recent' or 'random'"):
        KVCache(8, **SMALL, keep=40, policy="best")
    model.set_attn_implementation("eager")
    with pytest.raises(CompressError, match="sdpa"):
        logits_by_blocks(model, ids, KVCache(8, **SMALL, keep=40, config=model.config), 50)


def test_a_soft_prompt_and_a_packed_cache_go_together(prompted):
    pytest.importorskip("peft")
    ids = ids_of(rows=1, tokens=20)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    kv = {"bits": 8, "group": (4, 12), "residual": 8}
    plain, packed = (compress.load(prompted, bits=4, prompt=True, kv=one) for one in (None, kv))
    assert torch.equal(plain.generate(input_ids=ids, **options), packed.generate(input_ids=ids, **options))
    found = packed(input_ids=ids, use_cache=True)
    assert isinstance(getattr(found, cache_name(packed)), KVCache)
