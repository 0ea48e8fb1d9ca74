"""What users call on a loaded model, and peft does: every call is answered rightly or in one sentence."""

import copy
import io
import json
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import compress
from compress.adapters import attach_adapter, lora_config
from compress.errors import CompressError
from compress.hf import packed_modules
from compress.weights import Checkpoint
from tests.conftest import CONFIGS

peft = pytest.importorskip("peft")
TOKENS = torch.arange(5, 25)[None]
TARGETS = ["q_proj", "v_proj"]


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def states(model):
    return model.base_model(input_ids=TOKENS).last_hidden_state


@pytest.fixture
def rounded(recipe, make_model, tmp_path):
    """Make a checkpoint of 6 bits, or 3 and 4; ``include`` and ``embedding_bits`` pack more than the blocks."""

    def make(kind="llama", include=(), embedding_bits=0, **changes):
        recipe["model"] = str(make_model(kind, **changes))
        recipe["passes"] = [{"kind": "rtn", "bits": 6, "include": list(include)}]
        if embedding_bits:
            recipe["passes"] = [{"kind": "any_precision", "parent_bits": 4, "embedding_bits": embedding_bits}]
        return compress.run(recipe, tmp_path / "-".join([kind, *include]))

    return make


ENDS = {"include": ["lm_head", "model.embed_tokens"], "tie_word_embeddings": False}


# Other classes, other weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [name for name in CONFIGS if name not in ("mistral", "qwen2", "qwen3", "gemma", "gemma2")]
)
def test_other_classes_hold_the_same_blocks(rounded, tmp_path, kind):
    folder = rounded(kind)
    expected = states(compress.load(folder))
    for loader in (AutoModel, AutoModelForSequenceClassification):
        model = loader.from_pretrained(folder)
        assert torch.equal(states(model), expected)
        assert packed_modules(model)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "inner")
    for loader in (AutoModel, AutoModelForCausalLM):
        assert torch.equal(states(loader.from_pretrained(tmp_path / "inner")), expected)


@pytest.mark.slow
def test_a_packed_head_is_left_out_where_there_is_none(rounded):
    folder = rounded(**ENDS)
    model = AutoModel.from_pretrained(folder)
    assert torch.equal(states(model), states(compress.load(folder)))
    assert len(packed_modules(model)) == len(packed_modules(compress.load(folder))) - 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("llama", ENDS), ("gpt2", {}), ("gemma3_text", {})])
def test_a_dequantised_model_is_an_ordinary_one(rounded, tmp_path, kind, options):
    model = compress.load(rounded(kind, **options))
    expected = logits(model)
    assert model.dequantize() is model
    assert not packed_modules(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(model))
    model.resize_token_embeddings(310)
    assert logits(model).shape[-1] == 310


def test_dequantising_takes_the_bits_in_use(compressed):
    model = compress.load(compressed, bits=4)
    compress.set_bits(model, 3)
    expected = logits(model)
    assert torch.equal(logits(model.dequantize()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_a_dequantised_model_has_the_dtype_that_it_had_or_was_asked_for(rounded, tmp_path, kind):
    """The config's is the one of loading, and a word after a save."""
    model = compress.load(rounded(kind, embedding_bits=6), dtype=torch.bfloat16).to(torch.float32)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(copy.deepcopy(model).dequantize()), expected, rtol=1e-5, atol=1e-5)
    half = model.dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(half).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_a_packed_embedding_goes_with_the_model_to_another_dtype(rounded, kind):
    model = compress.load(rounded(kind, embedding_bits=6))
    expected = logits(model)
    assert model.get_input_embeddings()(torch.arange(3)).dtype == torch.float32
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(logits(model.to(torch.float64)), expected.double(), rtol=0.05, atol=0.05)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="may keep them in memory all the same")
def test_packed_modules_on_the_disk_are_refused(compressed, tmp_path):
    with pytest.raises(CompressError, match=r"is packed, so it cannot be left on the disk; give a device_map without"):
        AutoModelForCausalLM.from_pretrained(compressed, device_map={"": "disk"}, offload_folder=tmp_path)


@pytest.mark.slow
def test_tokens_are_added_beside_packed_blocks_and_refused_beside_a_packed_embedding(rounded, compressed):
    model = compress.load(compressed)
    before = logits(model)
    model.resize_token_embeddings(310, mean_resizing=False)
    assert torch.equal(logits(model)[..., :300], before)
    for options in (ENDS, {**ENDS, "include": ["lm_head"]}):
        model = compress.load(rounded(**options))
        assert model.resize_token_embeddings() is model.resize_token_embeddings(300) is model.get_input_embeddings()
        assert model.resize_token_embeddings(pad_to_multiple_of=100) is model.get_input_embeddings()
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(CompressError, match=r"embedding or head is packed.*dequantize\(\)"):
                copied.resize_token_embeddings(310)


# What stays as it is


def held(model):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    kept = [part for module in packed_modules(model).values() for part in (module._dense, module._prepared) if part]
    return sum(storages.values()), len(kept)


@pytest.mark.parametrize("exact", [True, False])
def test_a_forward_pass_unpacks_nothing(compressed, exact):
    if compress.backend().startswith("torch"):
        pytest.skip("without the C library the dense weight is kept")
    model = compress.load(compressed, exact=exact)
    before, _ = held(model)
    logits(model)
    model(inputs_embeds=model.get_input_embeddings()(TOKENS)).logits.sum().backward()
    assert held(model)[0] == before
    assert all(module._dense is None for module in packed_modules(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("keep_dense", [None, True])
def test_a_model_can_be_copied_pickled_and_saved_by_torch(rounded, exact, keep_dense):
    model = compress.load(rounded(**ENDS), exact=exact, keep_dense=keep_dense)
    expected, stored = logits(model), sum(t.nbytes for t in model.state_dict().values())
    pickled = pickle.dumps(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < 1.2 * stored + 1e5  # nothing that is kept between calls goes along
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickled), torch.load(file, weights_only=False)]
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    state.seek(0)
    fresh = compress.load(model.name_or_path, exact=exact, keep_dense=keep_dense)
    for module in packed_modules(fresh).values():
        module.get_buffer("weight").zero_()
    fresh.load_state_dict(torch.load(state, weights_only=True))
    for module in packed_modules(model).values():
        module.get_buffer("weight").zero_()  # the copies have memory of their own
    for copied in [*copies, fresh]:
        assert torch.equal(logits(copied), expected)


def test_tensors_read_from_a_file_share_no_memory(compressed):
    source = Checkpoint(compressed)
    names = sorted(source.info())[:6]
    first, second = source.read(names), source.read(names)
    for name in names:
        first[name].zero_()
        assert first[name].untyped_storage().nbytes() == first[name].nbytes
    assert any(second[name].any() for name in names)
    assert all(torch.equal(tensor, second[name]) for name, tensor in source.read(names).items())


# peft

SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"v_proj": 2}},
    {"alpha_pattern": {"v_proj": 64}},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [1]},
    {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    {"trainable_token_indices": [1, 5]},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "embed_tokens"]},
]


def adapted(model, **settings):
    """A model behind an adapter that changes what it says."""
    fields = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **settings}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_adapter_computes_what_it_did_before_it_was_saved(compressed, tmp_path, settings):
    model = adapted(compress.load(compressed), **settings)
    expected = logits(model)
    assert not torch.allclose(expected, logits(compress.load(compressed)), atol=0.01)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(attach_adapter(compress.load(compressed), tmp_path)), expected)
    assert torch.equal(logits(compress.load(compressed, adapter=tmp_path)), expected)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(compress.load(compressed), tmp_path)), expected)
    if settings.get("target_modules") == "all-linear":
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * len(packed_modules(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"the model's head is packed with its embedding, so it cannot be copied, trained or replaced",
        ),
        ({"trainable_token_indices": [1, 5]}, r"trainable_token_indices \(\[1, 5\]\) works on dense weights"),
    ],
    ids=str,
)
def test_an_adapter_of_a_packed_embedding_or_head_is_refused(rounded, tmp_path, settings, message):
    folder = rounded("llama", embedding_bits=6, tie_word_embeddings=True)
    adapted(compress.load(folder).dequantize(), **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CompressError, match=message):
        compress.load(folder, adapter=tmp_path / "adapter")
    with pytest.raises((CompressError, RuntimeError)):  # torch's for token indices, but never silently
        peft.PeftModel.from_pretrained(compress.load(folder), tmp_path / "adapter")


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_how_an_adapter_began_does_not_matter(tiny_llama, compressed, tmp_path, start):
    model = adapted(compress.load(tiny_llama), init_lora_weights=start)
    model.save_pretrained(tmp_path)
    assert not torch.equal(
        logits(attach_adapter(compress.load(compressed), tmp_path)), logits(compress.load(compressed))
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora .True. works on dense weights"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights .pissa. works on dense weights"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters .* works on dense weights"),
        (
            {"use_tomorrows_idea": True},
            "has the setting 'use_tomorrows_idea', which this release of peft does not know",
        ),
        ({"task_type": "SEQ_CLS"}, "is an adapter for SEQ_CLS, not of a causal LM"),
        ({"target_modules": ["q_proj"]}, "the model has no place for .*v_proj"),
        ({"target_modules": [*TARGETS, "k_proj"]}, "it lacks .*k_proj"),
        ({"target_modules": ["nothing"]}, "does not fit the model"),
        ({"r": 8}, "does not fit the model"),
    ],
    ids=str,
)
def test_what_would_not_be_followed_is_refused_by_name(compressed, tmp_path, fields, message):
    adapted(compress.load(compressed)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CompressError, match=message):
        attach_adapter(compress.load(compressed), tmp_path)


def test_a_tensor_of_another_adapter_is_refused(compressed, tmp_path):
    adapted(compress.load(compressed)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}, file)
    with pytest.raises(CompressError, match=r"the model has no place for .*lm_head"):
        attach_adapter(compress.load(compressed), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", [lora_config, peft.LoraConfig])
@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_into_packed_weights_is_refused_and_works_once_they_are_dense(compressed, call, config):
    model = peft.get_peft_model(compress.load(compressed), config(task_type="CAUSAL_LM", r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    expected = logits(model)
    for safe in (False, True):
        with pytest.raises(CompressError, match=r"cannot be merged into packed weights.*dequantize\(\)"):
            getattr(model, call)(safe_merge=safe)
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    model.get_base_model().dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    merged = getattr(model, call)() or model
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_can_be_taken_off_again(compressed):
    model = adapted(compress.load(compressed))
    bare = model.unload()
    assert torch.equal(logits(bare), logits(compress.load(compressed)))
    with pytest.raises(CompressError, match="cannot be merged into packed weights"):
        adapted(bare).merge_and_unload()


def test_a_packed_weight_can_be_looked_at_and_moved_but_not_calculated_with(compressed):
    model = compress.load(compressed)
    layer, x = model.model.layers[0].mlp.up_proj, torch.ones(1, 48)
    weight, held = layer.weight, dict(layer.named_buffers())["weight"]
    assert (weight.shape, weight.dtype, weight.device.type) == (held.shape, torch.int32, "cpu")
    assert type(weight.to("cpu")) is type(held) is torch.Tensor
    assert torch.equal(weight, held)
    calculations = (
        lambda: x @ weight.t(),
        lambda: torch.nn.functional.linear(x, weight),
        lambda: weight.float(),
        lambda: weight.data.add_(x),
        lambda: 0.5 * weight,
        lambda: weight.clone() + x,
    )
    for calculate in calculations:
        with pytest.raises(CompressError, match=r"bit planes.*dequantize\(\)"):
            calculate()
