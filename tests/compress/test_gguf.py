"""GGUF files are read as transformers reads them, tensor by tensor, and refused where its reader loses something."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import compress
from compress.errors import CompressError
from compress.plan import plan
from compress.source import open_source
from compress.weights import SINGLE

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the extra 'gguf'")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}


def own_name(name):
    module, _, kind = name.rpartition(".")
    block = module.removeprefix("model.layers.").partition(".")
    return f"{NAMES[module]}.{kind}" if module in NAMES else f"blk.{block[0]}.{NAMES[block[2]]}.{kind}"


def interleaved(weight, heads):
    """Rows of a Llama's queries or keys in llama.cpp's order."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(folder, target, more=lambda file: None, changed=lambda tensors: None, kind=None):
    """Write a model as llama.cpp's converter does: matrices of blocks in eight bits, embedding in sixteen, vectors in 32."""
    config = AutoConfig.from_pretrained(folder)
    file = gguf.GGUFWriter(target, kind or config.model_type)
    file.add_name("tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    file.add_token_merges([" ".join(pair) for pair in model["merges"]])
    file.add_bos_token_id(0)
    file.add_eos_token_id(0)
    more(file)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    tensors = {}
    for name, tensor in load_file(folder / SINGLE).items():
        ordered = [count for end, count in heads.items() if name.endswith(end) and config.model_type == "llama"]
        tensors[own_name(name)] = interleaved(tensor.numpy(), *ordered) if ordered else tensor.numpy()
    changed(tensors)
    for name, values in tensors.items():
        if name.startswith("blk.") and values.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            file.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            file.add_tensor(name, values.astype(np.float16 if values.ndim == 2 else np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return target


def dense(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture
def llama(make_model, tmp_path):
    return write(make_model("llama", **SIZES), tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_the_one_that_transformers_reads(make_model, tmp_path, kind, tied):
    path = write(make_model(kind, tie_word_embeddings=tied, **SIZES), tmp_path / "tiny.gguf")
    source, wanted = open_source(str(path)), dense(path).state_dict()
    stored = source.state.source
    assert wanted.keys() - stored.info().keys() == ({"lm_head.weight"} if tied else set())
    for name, info in stored.info().items():
        tensor = stored.read([name])[name]
        assert (tuple(tensor.shape), str(tensor.dtype)) == (info.shape, f"torch.{info.dtype}")
        torch.testing.assert_close(tensor.float(), wanted[name], rtol=0, atol=0)
    assert source.state.config.architectures == [type(dense(path)).__name__]
    # Whether a sentence begins with a token of its own is for transformers' release to say.
    split = (
        of("the dog", add_special_tokens=False).input_ids
        for of in (source.tokenizer, AutoTokenizer.from_pretrained(make_model(kind)))
    )
    assert next(split) == next(split)


@torch.no_grad()
def test_a_run_writes_an_ordinary_checkpoint(llama, tmp_path):
    (llama.parent / "LICENSE").write_text("Do as you like.")
    recipe = {"model": {"name": str(llama.parent), "gguf_file": llama.name}, "passes": [{"kind": "rtn", "bits": 8}]}
    folder, tokens = compress.run(recipe, tmp_path / "small"), torch.arange(5, 25)[None]
    wanted, model = dense(llama)(tokens).logits, compress.load(folder)
    assert (model(tokens).logits - wanted).norm() < 0.02 * wanted.norm()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (folder / "LICENSE").exists()
    assert not list(folder.glob("*.gguf"))
    split = [AutoTokenizer.from_pretrained(llama.parent, gguf_file=llama.name), AutoTokenizer.from_pretrained(folder)]
    assert split[0]("the dog").input_ids == split[1]("the dog").input_ids


@pytest.mark.slow
def test_a_file_is_measured_as_the_dense_model_of_its_checkpoint(llama, text_file, tmp_path, command):
    folder = compress.run({"model": str(llama), "passes": [{"kind": "rtn", "bits": 8}]}, tmp_path / "small")
    code, said, complaint = command(
        "eval", folder, "--dense", "--agreement", "--text", text_file, "--length", "32", "--json", "-"
    )
    assert code == 0, complaint
    assert json.loads(said)["agreement"]["8"]["top1_agreement"] > 0.9


def test_a_run_without_packed_matrices_saves_what_transformers_reads(llama, tmp_path):
    recipe = {"model": str(llama), "passes": [{"kind": "prune", "score": "magnitude", "sparsity": 0.01}]}
    tensors = load_file(compress.run(recipe, tmp_path / "sparse") / SINGLE)
    wanted = dense(llama).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = tensors[name] != 0
    assert kept.float().mean() > 0.98
    assert torch.equal(tensors[name][kept], wanted[name][kept])


def scaled(file):
    file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    file.add_rope_scaling_factor(4.0)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_factors(tensors):
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)


REFUSED = {
    "scaled": ({"more": scaled}, r"rope\.scaling\.\w+ is .*, which transformers' reader leaves out.*start from the checkpoint"),
    "factors": ({"changed": with_factors}, r"rope_freqs\.weight has no place .*\(RoPE scaling\); start from"),
    "unknown key": ({"more": lambda file: file.add_logit_scale(0.5)}, r"llama\.logit_scale is 0\.5, which"),
    "parts": ({"more": lambda file: file.add_uint16("split.count", 2)}, r"one of 2 parts; join them with llama-gguf-split"),
    "type": ({"kind": "mamba9"}, r"mamba9 is not supported"),
    "missing": ({"changed": without("blk.1.ffn_up.weight")}, r"up_proj"),
    "size": ({"changed": lambda tensors: tensors.update({"output_norm.weight": np.ones(3, np.float32)})}, r"output_norm\.weight has \[3\], but the file's own sizes make it \[64\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused_in_the_plan(make_model, tmp_path, case):
    given, said = REFUSED[case]
    path = write(make_model("llama", **SIZES), tmp_path / "other.gguf", **given)
    with pytest.raises(CompressError, match=said):
        plan({"model": str(path), "passes": [{"kind": "rtn"}]})


def test_a_way_to_split_text_that_transformers_does_not_know_needs_the_tokenizer(make_model, tmp_path):
    folder = make_model("llama", **SIZES)
    path = write(folder, tmp_path / "t.gguf", lambda file: file.add_tokenizer_pre("new"))
    with pytest.raises(CompressError, match=r"tokenizer\.ggml\.pre 'new' names; put the tokenizer\.json .* beside it"):
        open_source(str(path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    assert (
        open_source(str(path)).tokenizer("the dog").input_ids
        == AutoTokenizer.from_pretrained(folder)("the dog").input_ids
    )
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CompressError, match=r"the tokenizer\.json beside it is of another model"):
        open_source(str(path))


def test_a_damaged_file_and_a_missing_package_are_one_sentence(llama, monkeypatch):
    whole = llama.read_bytes()
    for damaged in (b"nothing", whole[: len(whole) // 2]):
        llama.write_bytes(damaged)
        with pytest.raises(CompressError, match=r"tiny\.gguf: not a readable GGUF file .* fetch it again"):
            open_source(str(llama))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CompressError, match=r"needs gguf: pip install 'compress-llm\[gguf\]'"):
        open_source(str(llama))
