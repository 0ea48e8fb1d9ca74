"""The plugin against a stub of vLLM's interface: what is registered, loaded, cut and refused; the engine itself is in engine/."""

import json
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm_stub
from safetensors.torch import load_file
from vllm_stub import LinearBase, ParallelLMHead, QKVParallelLinear, VocabParallelEmbedding, current, vllm_config

import compress
from compress.errors import CompressError

PROJECTIONS = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
PROJECTIONS |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


@pytest.fixture(scope="module")
def plugin():
    vllm_stub.install()
    import compress.vllm

    compress.vllm.register()
    compress.vllm.register()
    yield vllm_stub.REGISTERED["compress"]
    vllm_stub.remove()


def made(folder, codebooks):
    """The built-in model with packed embedding and tied head, one matrix dense."""
    settings = {"objective": "output", "codebooks": codebooks, "embedding_bits": "auto", "correction": 0}
    quantise = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 5, "ignore": ["re:.*0.self_attn.k_proj"]}
    text = {"builtin": "stdlib", "samples": 2, "length": 32}
    recipe = {
        "model": "builtin",
        "calibration": text,
        "passes": [{**quantise, **settings, "sensitivity": "activation"}],
    }
    compress.run(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With shared codebooks, and sizes for groups of 64 of its 192 and 500 columns."""
    return made(tmp_path_factory.mktemp("served") / "checkpoint", "shared")


@pytest.fixture(scope="module")
def by_row(tmp_path_factory):
    """With codebooks of rows' own, which may be cut anywhere."""
    return made(tmp_path_factory.mktemp("served") / "by-row", "row")


def configured(plugin, folder, **overrides):
    """Go the way that vLLM goes: read, pickle for the other processes, map the names."""
    config = plugin.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    hf_config = type("Config", (), {})()
    vars(hf_config).update(overrides)
    config.maybe_update_config(str(folder), hf_config=hf_config, revision=None)
    return pickle.loads(pickle.dumps(config))


def fill(layer, folder, prefix):
    """Load a layer's tensors as vLLM's models do."""
    path, _, last = prefix.rpartition(".")
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        above, _, own = module.rpartition(".")
        fused, shard = PROJECTIONS.get(own, (own, None))
        if (above, fused) == (path, last):
            parameter = parameters[kind]
            parameter.weight_loader(*((parameter, tensor) if shard is None else (parameter, tensor, shard)))
    layer.quant_method.process_weights_after_loading(layer)


def weight_of(folder, name, bits):
    model = compress.load(folder, bits=bits, dtype=torch.float32)
    module = model.get_submodule(name)
    return module.dense() if hasattr(module, "dense") else module.weight.detach()


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2])
def test_a_fused_layer_multiplies_by_what_the_checkpoint_has(plugin, by_row, degree):
    """Packed and dense parts side by side, cut by heads."""
    prefix, x = "model.layers.0.self_attn.qkv_proj", torch.randn(3, 192)
    found = []
    for rank in range(degree):
        with current(vllm_config()):
            config = configured(plugin, by_row, compress_bits=3)
            layer = QKVParallelLinear(config, prefix, 192, [192, 64, 64], torch.float32, rank, degree)
            fill(layer, by_row, prefix)
        found.append(layer.quant_method.apply(layer, x).split([192 // degree, 64 // degree, 64 // degree], -1))
    assert not dict(layer.named_parameters(recurse=False))
    for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
        wanted = x @ weight_of(by_row, f"model.layers.0.self_attn.{name}", 3).t()
        torch.testing.assert_close(torch.cat([parts[place] for parts in found], -1), wanted)


@pytest.mark.slow
def test_a_layer_split_by_its_inputs_adds_up(plugin, by_row):
    """500 inputs over 2 processes: the second begins within a word of the planes."""
    prefix, x, total = "model.layers.1.mlp.down_proj", torch.randn(3, 500), 0
    for rank in range(2):
        with current(vllm_config()):
            layer = LinearBase(configured(plugin, by_row), prefix, 500, [192], torch.float32, rank, 2, "in")
            fill(layer, by_row, prefix)
        total = total + layer.quant_method.apply(layer, x[:, rank * 250 : (rank + 1) * 250])
    torch.testing.assert_close(total, x @ weight_of(by_row, prefix, None).t())


@pytest.mark.slow
def test_an_embedding_without_a_name_and_the_head_that_is_tied_to_it(plugin, checkpoint):
    tokens, x = torch.tensor([3, 2047]), torch.randn(2, 192)
    with current(vllm_config()):
        config = configured(plugin, checkpoint, compress_bits=2)
        layer = VocabParallelEmbedding(config, "", 2048, 192, torch.float32)
        fill(layer, checkpoint, "model.embed_tokens")
        head = ParallelLMHead(config, "lm_head", 2048, 192, torch.float32)
        head.quant_method.tie_weights(head, layer)
    wanted = weight_of(checkpoint, "model.embed_tokens", 2)
    torch.testing.assert_close(layer.quant_method.embedding(layer, tokens), wanted[tokens])
    torch.testing.assert_close(head.quant_method.apply(head, x), x @ wanted.t())


@pytest.mark.slow
def test_compiled_code_finds_its_layer_when_it_is_called(plugin, checkpoint):
    """So a change of bits after compiling is not lost."""
    from compress.vllm.matrices import packed_parts, switch

    prefix, x = "model.layers.1.mlp.gate_up_proj", torch.randn(3, 192)
    with current(vllm_config()):
        config = configured(plugin, checkpoint, compress_bits=2, compress_held_bits=5)
        layer = LinearBase(config, prefix, 192, [500, 500], torch.float32)
        fill(layer, checkpoint, prefix)
        compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), backend="eager", fullgraph=True)
        before = compiled(x)
        switch(packed_parts(layer), {f"model.layers.1.mlp.{name}": 5 for name in ("gate_proj", "up_proj")})
        after = compiled(x)
    for bits, found in ((2, before), (5, after)):
        parts = [weight_of(checkpoint, f"model.layers.1.mlp.{name}", bits) for name in ("gate_proj", "up_proj")]
        torch.testing.assert_close(found, x @ torch.cat(parts).t())


@pytest.mark.slow
def test_bits_of_the_configuration_of_the_engine_and_of_a_draft(plugin, checkpoint):
    extra = {"compress": {"bits": 4, "draft_bits": 2}}
    name = "model.layers.0.self_attn.o_proj"
    for prefix, bits in ((name, 4), (f"draft_model.{name}", 2)):
        with current(vllm_config(additional_config=extra)):
            config = configured(plugin, checkpoint)
            LinearBase(config, prefix, 192, [192], torch.float32)
        assert config.held[name].bits == bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"compress_bits": 9}, "9 bits are not available; this model can be read at 2 to 5 bits"),
        ({"compress_bits": "two"}, "bits 'two': give a number, a mean such as 3.5, or patterns"),
        ({"compress_held_bits": 7}, "held_bits 7: this model can be read at 2 to 5 bits"),
        (
            {"compress_bit": 3},
            r"--hf-overrides\.compress_bit: there is no such setting of compress\. Did you mean 'bits'",
        ),
        ({"compress_bits": 3, "compress_memory": "1GB"}, "two ways to choose bits"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_any_work(plugin, checkpoint, overrides, message):
    with pytest.raises(CompressError, match=message):
        configured(plugin, checkpoint, **overrides)


@pytest.mark.slow
def test_an_override_that_drops_the_records_does_not_hide_them(plugin, checkpoint):
    config = plugin.from_config({"quant_method": "compress", "bits": 3})
    config.maybe_update_config(str(checkpoint), hf_config=type("Config", (), {})())
    assert len(config.shapes) == 42


@pytest.mark.slow
@pytest.mark.parametrize(("which", "degree", "legal"), [("by_row", 3, "1, 2"), ("checkpoint", 2, "1")])
def test_a_degree_that_the_model_does_not_divide_by_is_refused(plugin, request, which, degree, legal):
    """Nor is one that would cut a group of columns: 96 of 192."""
    config = configured(plugin, request.getfixturevalue(which))
    said = f"over {degree} processes; legal degrees are {legal}."
    with current(vllm_config()), pytest.raises(CompressError, match=said):
        LinearBase(config, "model.layers.0.mlp.down_proj", 500, [192], torch.float32, 0, degree, "in")


def test_a_plugin_that_cannot_be_imported_warns_and_does_not_stop_vllm(monkeypatch, caplog):
    import compress.vllm as package

    monkeypatch.setitem(sys.modules, "compress.vllm.config", None)
    package.register()
    assert "cannot serve its checkpoints in this vLLM" in caplog.text


@pytest.mark.slow
def test_bits_that_a_graph_would_hold_fast_are_refused(plugin, checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = vllm_config()
    config.compilation_config.cudagraph_mode = SimpleNamespace(name="PIECEWISE")
    name = "model.layers.0.self_attn.o_proj"
    with current(config), pytest.raises(CompressError, match="add --enforce-eager"):
        LinearBase(configured(plugin, checkpoint, compress_held_bits=4), name, 192, [192], torch.float32)
