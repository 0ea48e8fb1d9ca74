"""Block streaming computes what the whole model computes, for every declared architecture."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

import compress
from compress import streaming
from compress.calibration import Samples
from compress.errors import CompressError
from compress.fisher import squared_gradients
from compress.source import open_source
from compress.streaming import StreamedModel
from compress.structure import ARCHITECTURES
from compress.workspace import Stage
from tests.conftest import stream

CPU = torch.device("cpu")
TOKENS = torch.arange(5, 29)
KINDS = [kind for family in ARCHITECTURES for kind in family.model_types]
WITH_A_CACHE_ALONE = Version(transformers.__version__) < Version("5.6")  # layers share keys and values


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_streamed_logits_equal_the_models_own(make_model, kind):
    folder = make_model(kind)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS[None]).logits[0]
    model = StreamedModel(open_source(str(folder)).state, CPU)
    torch.testing.assert_close(model.logits(TOKENS, stream(model, TOKENS)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fast_products_stay_near_and_hidden_states_float32(tiny_llama, monkeypatch):
    monkeypatch.setattr(streaming, "_FAST_FROM", 1)
    monkeypatch.setattr(streaming, "multiplies_bfloat16", lambda device: True)
    state = open_source(str(tiny_llama)).state
    exact, fast = (stream(StreamedModel(state, CPU, fast=fast), TOKENS) for fast in (False, True))
    assert fast.dtype == torch.float32
    assert 0 < (fast - exact).norm() < 0.02 * exact.norm()


def test_only_one_block_is_in_memory(tiny_llama):
    model = StreamedModel(open_source(str(tiny_llama)).state, CPU)
    with model.block(1):
        inside = {name for name, p in model.model.named_parameters() if "layers" in name and p.device.type == "cpu"}
        assert inside
        assert all(name.startswith("model.layers.1.") for name in inside)
    assert all(p.device.type == "meta" for name, p in model.model.named_parameters() if "layers" in name)


def plain_fisher(folder, samples, names):
    """One backward pass of the whole model per sample, the textbook way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = dict.fromkeys(names, 0)
    for tokens in samples:
        model.zero_grad()
        model(input_ids=tokens[None], labels=tokens[None]).loss.backward()
        for name in names:
            total[name] = total[name] + model.get_parameter(f"{name}.weight").grad ** 2
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "gemma3n_text", "zaya"])  # the last two hand on more than hidden states
def test_squared_gradients_equal_plain_backpropagation(make_model, tmp_path, kind):
    if kind == "gemma3n_text" and WITH_A_CACHE_ALONE:
        pytest.skip("this transformers lets layers share keys and values through a cache alone")
    folder = make_model(kind)
    model = StreamedModel(open_source(str(folder)).state, CPU)
    samples = Samples((TOKENS, TOKENS[:9] + 3), {})
    stage = Stage(tmp_path, "key")
    squared_gradients(model, samples, stage, [], lambda *_: None)
    found = {name: value for i in range(len(model.blocks)) for name, value in stage.load(f"fisher-{i}").items()}
    found = {name: value for name, value in found.items() if ".experts." not in name}  # stacks in the plain model
    for name, expected in plain_fisher(folder, samples.tokens, found).items():
        expected = expected.t() if kind == "gpt2" else expected  # Conv1D keeps the transpose
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3 * expected.max().item())
    assert not list(tmp_path.glob("hidden-*")), "hidden states are cleared away"


@pytest.mark.slow
def test_layers_that_share_keys_where_there_is_a_cache_alone_are_refused(recipe, make_model, tmp_path):
    """Blocks run without a cache, as in training: before transformers 5.6 that is another model."""
    recipe |= {"model": str(make_model("gemma3n_text")), "passes": [{"kind": "rtn", "bits": 4}]}
    if WITH_A_CACHE_ALONE:
        with pytest.raises(
            CompressError, match=r"before transformers 5\.6 its layers share keys .* install a newer one"
        ):
            compress.run(recipe, tmp_path / "out")
    else:
        assert compress.run(recipe, tmp_path / "out").is_dir()


def test_squared_gradients_of_head_and_embedding(make_model, tmp_path):
    folder = make_model("llama", tie_word_embeddings=False)
    model = StreamedModel(open_source(str(folder)).state, CPU)
    samples = Samples((TOKENS, TOKENS[:9] + 3), {})
    names = ["lm_head", "model.embed_tokens"]
    squared_gradients(model, samples, Stage(tmp_path, "key"), names, lambda *_: None)
    found = Stage(tmp_path, "key").load("fisher--1")
    for name, expected in plain_fisher(folder, samples.tokens, names).items():
        expected = expected.mean(1, keepdim=True)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3 * expected.max().item())
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = torch.cat([dense.model(input_ids=tokens[None]).last_hidden_state[0] for tokens in samples.tokens]).detach()
    torch.testing.assert_close(found["hessian of lm_head"], hidden.t() @ hidden / len(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_squared_gradients_of_a_tied_embedding_are_those_of_both_uses(make_model, tmp_path, kind):
    tied, untied = make_model(kind, tie_word_embeddings=True), tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(untied)
    samples = Samples((TOKENS, TOKENS[:9] + 3), {})
    stage = Stage(tmp_path, "key")
    squared_gradients(
        StreamedModel(open_source(str(tied)).state, CPU), samples, stage, ["model.embed_tokens"], lambda *_: None
    )
    found = stage.load("fisher--1")["model.embed_tokens"]
    parts = plain_fisher(untied, samples.tokens, ["lm_head", "model.embed_tokens"]).values()
    expected = sum(parts).mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.max().item())


def test_damaged_weights_are_named(tmp_path, make_model):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"):
        StreamedModel(open_source(str(folder)).state, CPU)
