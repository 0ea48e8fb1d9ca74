"""A checkpoint loads in any process at any width, and stops loudly where it must not load."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.errors import CompressError
from compress.hf import packed_modules

KINDS = ("qwen3", "gemma3_text", "opt", "gpt2", "gpt_neox", "bloom")  # other types: test_models.py
TOKENS = torch.arange(5, 25)[None]
PRINT_LOGITS = """
import sys, json, torch, {imports}
from transformers import AutoModelForCausalLM
model = {load}
print(json.dumps(model(torch.arange(5, 25)[None]).logits[0, -1].tolist()))
"""


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def rewrite(folder, change):
    """Change one tensor file of a copy in place: ``change(tensors)``."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if change(tensors):
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError("nothing to change")


@pytest.fixture
def copy(compressed, tmp_path):
    return shutil.copytree(compressed, tmp_path / "copy")


def decode_by_hand(module, row, column):
    """One weight read as FORMAT.md says: bit column % 32 of word column // 32, first plane highest."""
    code = 0
    for plane in module.planes():
        code = 2 * code + (int(plane[row, column // 32]) >> (column % 32) & 1)
    factor = 1.0 if module.factors is None else module.factors[column]
    return module.codebook()[row, code].float() * factor


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_a_width_is_what_the_format_says(tiny_llama, compressed, bits):
    """Weights are those read by hand; put into the dense architecture they give the same logits."""
    model = compress.load(compressed, bits=bits)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name, module in packed_modules(model).items():
        weight = module.dense()
        for row, column in ((0, 0), (1, 31), (2, 32), (3, weight.shape[1] - 1)):
            assert weight[row, column] == decode_by_hand(module, row, column)
        plain.get_submodule(name).weight.data = weight
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)  # columns' factors meet the input


@pytest.mark.slow
def test_a_fresh_process_loads_every_width(compressed, run_code):
    loads = ["AutoModelForCausalLM.from_pretrained(sys.argv[1])"]
    loads += [f"compress.load(sys.argv[1], bits={bits})" for bits in (3, 5, 6)]
    code = "".join(PRINT_LOGITS.format(imports="compress", load=load) for load in loads)
    found = [json.loads(line) for line in run_code(code, compressed).splitlines()]
    model = compress.load(compressed)
    for bits, values in zip((6, 3, 5, 6), found, strict=True):
        compress.set_bits(model, bits)
        torch.testing.assert_close(torch.tensor(values), logits(model)[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_the_import_loading_stops(make_model, recipe, tmp_path, plain_python):
    code = "import sys\nfrom transformers import AutoModelForCausalLM\n"
    for kind in ("llama", "gpt2"):
        compress.run({**recipe, "model": str(make_model(kind))}, tmp_path / kind)
        code += f"try: AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/{kind}')\n"
        code += "except Exception as error: print('mismatch' in str(error))\n"
    assert plain_python(code, tmp_path).split() == ["True", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_goes_through(make_model, recipe, tmp_path, kind):
    """At 8 bits a tiny random model's logits hardly move; generation with cache equals without."""
    recipe["passes"] = [{"kind": "any_precision", "seed_bits": 4}]
    source = make_model(kind)
    folder = compress.run({**recipe, "model": str(source)}, tmp_path / "model")
    model = compress.load(folder)
    dense = logits(AutoModelForCausalLM.from_pretrained(source))
    assert (logits(model) - dense).abs().max() < 0.05 * dense.abs().max()
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(TOKENS, use_cache=True, **generate)
    assert torch.equal(with_cache, model.generate(TOKENS, use_cache=False, **generate))


def test_width_changes_at_run_time(compressed):
    model = compress.load(compressed)
    assert compress.get_bits(model) == 6
    high = logits(model)
    compress.set_bits(model, 3)
    assert compress.get_bits(model) == 3
    assert not torch.equal(logits(model), high)
    compress.set_bits(model, 6)
    assert torch.equal(logits(model), high)


def test_widths_by_pattern(compressed):
    pattern = {r"re:.*down_proj": 6, "model.layers.0.self_attn.q_proj": 4}
    model = compress.load(compressed, bits={r"re:.*": 3, **pattern})
    widths = compress.get_bits(model)
    assert widths["model.layers.1.mlp.down_proj"] == 6
    assert widths["model.layers.0.self_attn.q_proj"] == 4
    assert widths["model.layers.2.self_attn.q_proj"] == 3
    switched = compress.load(compressed)
    compress.set_bits(switched, 3)
    compress.set_bits(switched, pattern)
    assert torch.equal(logits(model), logits(switched))


def test_a_width_that_is_not_there(compressed):
    with pytest.raises(CompressError, match="7 bits are not available; this model can be read at 3 to 6 bits"):
        compress.load(compressed, bits=7)
    with pytest.raises(CompressError, match="Load it at more bits"):
        compress.set_bits(compress.load(compressed, bits=4), 5)
    with pytest.raises(CompressError, match="matches no module"):
        compress.load(compressed, bits={"re:.*experts.*": 3})


def test_a_dense_model_has_no_widths(tiny_llama):
    with pytest.raises(CompressError, match="not a compressed checkpoint"):
        compress.load(tiny_llama, bits=4)
    with pytest.raises(CompressError, match="no packed modules"):
        compress.set_bits(compress.load(tiny_llama), 4)


def test_higher_planes_may_be_absent_from_the_disk(copy):
    """What 3 bits need lies in files of its own: the others can be missing altogether."""
    expected = logits(compress.load(copy, bits=3))
    for file in copy.glob("model-[456]bit-*.safetensors"):
        file.unlink()
    assert torch.equal(logits(compress.load(copy, bits=3)), expected)
    with pytest.raises(CompressError, match="which is not there"):
        compress.load(copy, bits=4)


@pytest.mark.slow
def test_from_the_hub_only_what_a_width_needs_is_fetched(compressed, tmp_path, fresh_python):
    """A hub cache that has the files of 3 bits and no others, and no network."""
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("0123")
    for file in (*compressed.glob("config.json"), *compressed.glob("*3bit*")):
        shutil.copy(file, snapshot)
    code = PRINT_LOGITS.format(imports="compress", load="compress.load('someone/small', bits=3)")
    found = json.loads(fresh_python(code, HF_HUB_CACHE=str(tmp_path)))
    expected = logits(compress.load(compressed, bits=3))[0, -1]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_several_shards_per_step(recipe, compressed, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.writer._SMALLEST_SHARD", 1)
    folder = compress.run(recipe, tmp_path / "model")
    assert len(list(folder.glob("model-3bit-*.safetensors"))) > 1
    assert torch.equal(logits(compress.load(folder, bits=4)), logits(compress.load(compressed, bits=4)))


@pytest.mark.slow
def test_a_loaded_model_can_be_saved_again(compressed, tmp_path, plain_python):
    code = "import sys\nfrom transformers import AutoModelForCausalLM\n"
    for bits in (None, 4):
        folder, model = tmp_path / str(bits), compress.load(compressed, bits=bits)
        model.save_pretrained(folder)
        again = compress.load(folder)
        assert torch.equal(logits(again), logits(model))
        assert compress.get_bits(again) == (bits or 6)
        compress.set_bits(again, 3)
        compress.set_bits(model, 3)
        assert torch.equal(logits(again), logits(model))
        code += f"try: AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/{bits}')\n"
        code += "except Exception as error: print('mismatch' in str(error))\n"
    assert plain_python(code, tmp_path).split() == ["True", "True"]


@pytest.mark.parametrize("exact", [True, False])
def test_a_model_that_has_run_is_saved_as_it_was_stored(compressed, tmp_path, exact):
    model = compress.load(compressed, exact=exact)
    with torch.no_grad():
        before = logits(model)
    model.save_pretrained(tmp_path / "again")
    stored = {name: tensor for file in compressed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())
    with torch.no_grad():
        assert torch.equal(logits(compress.load(tmp_path / "again", exact=exact)), before)


@pytest.mark.parametrize("exact", [True, False])
def test_every_way_through_a_packed_layer_gives_the_same_logits(compressed, exact):
    model, dense = compress.load(compressed, exact=exact), compress.load(compressed, keep_dense=True)
    with torch.no_grad():
        expected, direct = logits(dense), logits(model)
        embedded = model.get_input_embeddings()(TOKENS)
    differentiable = model(inputs_embeds=embedded.requires_grad_()).logits
    assert differentiable.requires_grad
    torch.testing.assert_close(differentiable.detach(), expected, rtol=1e-4, atol=1e-4)
    error = (direct - expected).norm() / expected.norm()
    assert error < (1e-5 if exact else 0.03)
    assert all(module._dense is None for module in packed_modules(model).values()) or "torch" in compress.backend()[:5]


def test_tables_keep_their_type_when_the_model_is_cast(compressed):
    model = compress.load(compressed, dtype=torch.bfloat16)
    module = packed_modules(model)["model.layers.0.mlp.up_proj"]
    assert module.codebook().dtype == torch.float16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    exact = logits(compress.load(compressed, dtype=torch.float32))
    assert (logits(model).float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(compressed, device_map):
    model = compress.load(compressed, bits=4, device_map=device_map)
    assert torch.equal(logits(model), logits(compress.load(compressed, bits=4)))


@pytest.mark.slow
def test_a_module_that_is_loaded_again_is_not_registered_twice(run_code):
    assert run_code("import importlib, compress; print(importlib.reload(compress.hf).METHOD)").strip() == "compress"


@pytest.mark.slow
def test_untied_head_and_embedding_can_be_packed(make_model, recipe, tmp_path):
    recipe["model"] = str(make_model("llama", tie_word_embeddings=False))
    recipe["passes"][0] |= {"include": ["lm_head", "model.embed_tokens"]}
    model = compress.load(compress.run(recipe, tmp_path / "model"))
    assert {"lm_head", "model.embed_tokens"} <= packed_modules(model).keys()
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 24)


@pytest.mark.slow
def test_a_packed_embedding_keeps_its_scale(make_model, recipe, tmp_path):
    """Gemma multiplies its embeddings by the square root of the hidden size."""
    source = make_model("gemma3_text", tie_word_embeddings=False)
    recipe |= {"model": str(source), "passes": [{"kind": "rtn", "bits": 8, "include": ["model.embed_tokens"]}]}
    model = compress.load(compress.run(recipe, tmp_path / "model"))
    dense = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings()(TOKENS)
    assert (model.get_input_embeddings()(TOKENS) - dense).abs().max() < 0.02 * dense.abs().max()


def test_a_missing_plane_is_named(copy):
    name = "model.layers.1.mlp.up_proj.plane_5"
    rewrite(copy, lambda tensors: tensors.pop(name, None) is not None)
    for load in (AutoModelForCausalLM.from_pretrained, compress.load):
        with pytest.raises(CompressError, match=re.escape(name)):
            load(copy)


def test_nothing_is_made_up_where_all_planes_are_missing(compressed, tmp_path):
    compress.load(compressed).save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: [tensors.pop(n) for n in list(tensors) if "_proj." in n])
    with pytest.raises(CompressError, match="is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_plane_of_another_type_is_refused(copy):
    name = "model.layers.1.mlp.up_proj.plane_5"
    rewrite(copy, lambda tensors: name in tensors and tensors.update({name: tensors[name].float()}) is None)
    with pytest.raises(CompressError, match=rf"{re.escape(name)} is float32"):
        compress.load(copy)


def test_a_truncated_shard_is_named(copy):
    file = next(copy.glob("model-5bit-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CompressError, match=r"model-5bit-00001-of-00001.*not a readable safetensors"):
        compress.load(copy)


def test_a_missing_shard_is_named(copy):
    next(copy.glob("model-4bit-*.safetensors")).unlink()
    with pytest.raises(CompressError, match="model-4bit-00001-of-00001"):
        compress.load(copy)


def test_an_unknown_format_version_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match="format_version 99"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent_bits": 12}, "out of range"),
        ({"in_features": 5}, "recorded as"),
        ({"colour": "red"}, "malformed"),
        ({"seed_bits": "3"}, "no integer"),
    ],
)
def test_malformed_module_records_are_refused(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def test_the_tokenizer_comes_along(compressed, tiny_llama):
    text = "the lazy dog"
    assert AutoTokenizer.from_pretrained(compressed)(text) == AutoTokenizer.from_pretrained(tiny_llama)(text)


def test_gradients_reach_the_input_through_packed_layers(compressed, tiny_llama):
    model = compress.load(compressed, bits=4, keep_dense=False, dtype=torch.float32)
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, module in packed_modules(model).items():
        dense.get_submodule(name).weight.data = module.dense(torch.float32)
    expected = embeddings.detach().clone().requires_grad_()
    dense(inputs_embeds=expected).logits.sum().backward()
    torch.testing.assert_close(embeddings.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_a_quantizer_is_asked_for_conversions_with_and_without_the_model(compressed):
    """transformers 5.10 gives the conversions alone, 5.24 the model too."""
    model = compress.load(compressed)
    for arguments in ((["a renaming"],), (["a renaming"], model)):
        assert model.hf_quantizer.update_weight_conversions(*arguments) == ["a renaming"]
