"""What is read of a model, block by block, is the model that transformers makes of the same files."""

import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import compress
from compress.errors import CompressError
from compress.source import check_source, checkpoint_state, open_source
from compress.streaming import StreamedModel
from compress.structure import ARCHITECTURES
from compress.weights import INDEX, SINGLE

KINDS = [kind for family in ARCHITECTURES for kind in family.model_types]
TOKENS = torch.arange(5, 25)


def rewritten(folder, copy, change):
    """A copy of a model with other tensors."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / SINGLE)
    change(tensors)
    (copy / SINGLE).unlink()
    save_file(tensors, copy / SINGLE, {"format": "pt"})
    return copy


def head_and_embedding(folder):
    """Names in the file of a tied model: of the head it could have, and of its embedding."""
    source = open_source(str(folder))
    model = StreamedModel(source.state, torch.device("meta"))
    stored = model.structure.stored_name
    embedding = f"{model.structure.embedding}.weight"
    names = load_file(folder / SINGLE).keys()
    return stored(f"{model.head}.weight"), next(name for name in names if embedding.endswith(name))


@torch.no_grad()
def streamed(folder):
    return StreamedModel(checkpoint_state(folder), torch.device("cpu")).run_all(TOKENS)


@torch.no_grad()
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS[None]).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_read_as_transformers_reads_it(make_model, kind, tied):
    folder = make_model(kind, tie_word_embeddings=tied)
    torch.testing.assert_close(streamed(folder), loaded(folder), atol=1e-6, rtol=1e-6)
    check_source(open_source(str(folder)), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "llama"])
def test_a_model_in_sixteen_bits_too(make_model, tmp_path, kind):
    """Gemma's embeddings are multiplied by a number that transformers rounds to the model's own type."""
    AutoModelForCausalLM.from_pretrained(make_model(kind), dtype=torch.bfloat16).save_pretrained(tmp_path / kind)
    AutoTokenizer.from_pretrained(make_model(kind)).save_pretrained(tmp_path / kind)
    torch.testing.assert_close(streamed(tmp_path / kind), loaded(tmp_path / kind), atol=1e-6, rtol=1e-6)
    check_source(open_source(str(tmp_path / kind)), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt", "gpt2", "bloom"])
def test_a_head_of_its_own_is_used_whatever_the_config_says(make_model, recipe, tmp_path, kind, verify):
    """config.json says tied, the file has two tensors that differ: transformers uses both, and so must everything here."""
    folder = make_model(kind, tie_word_embeddings=True)
    head, embedding = head_and_embedding(folder)

    def change(tensors):
        torch.manual_seed(0)
        table = tensors[embedding]
        tensors[head] = table + 0.3 * table.std() * torch.randn_like(table)

    source = rewritten(folder, tmp_path / "source", change)
    assert json.loads((source / "config.json").read_text()).get("tie_word_embeddings", True)
    torch.testing.assert_close(streamed(source), loaded(source), atol=1e-6, rtol=1e-6)
    recipe |= {"model": str(source), "passes": [{"kind": "rtn", "bits": 8, "include": ["lm_head"]}]}
    output = compress.run(recipe, tmp_path / "made")
    assert verify(output)
    model = compress.load(output)
    apart = (model(TOKENS[None]).logits[0] - loaded(source)).abs().max()
    assert apart < 0.1 * (loaded(source) - loaded(folder)).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["both", "head"])
def test_one_tensor_under_either_name_stays_tied(tiny_llama, make_model, recipe, tmp_path, keep, verify):
    folder = make_model("llama", tie_word_embeddings=True)
    head, embedding = head_and_embedding(folder)

    def change(tensors):
        tensors[head] = tensors[embedding].clone()
        if keep == "head":
            del tensors[embedding]

    source = rewritten(folder, tmp_path / "source", change)
    torch.testing.assert_close(streamed(source), loaded(folder), atol=1e-6, rtol=1e-6)
    opened = open_source(str(source))
    assert opened.state.config.tie_word_embeddings
    assert head not in opened.state.source.info()
    output = compress.run({**recipe, "model": str(source), "passes": [{"kind": "rtn", "bits": 8}]}, tmp_path / "made")
    assert verify(output)


@pytest.mark.slow
def test_weights_in_one_file_come_before_an_index(tiny_llama, make_model, tmp_path):
    """A folder saved twice may have both; transformers looks for the single file first."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    other = load_file(make_model("llama", initializer_range=0.5) / SINGLE)
    save_file({name: tensor + 0.1 for name, tensor in other.items()}, source / "old.safetensors", {"format": "pt"})
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, "old.safetensors")}))
    assert torch.equal(streamed(source), streamed(tiny_llama))
    check_source(open_source(str(source)), TOKENS)


@pytest.mark.slow
def test_another_model_is_refused_before_any_work(tiny_llama, make_model, recipe, tmp_path, monkeypatch):
    source = open_source(str(tiny_llama))
    noisy = rewritten(tiny_llama, tmp_path / "noisy", lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    with pytest.raises(CompressError, match=r"read block by block it computes other logits .* than transformers"):
        check_source(replace(source, state=open_source(str(noisy)).state), TOKENS)
    asked = []
    monkeypatch.setattr("compress.pipeline.check_source", lambda *given: asked.append(given))
    recipe["passes"] = [{"kind": "rtn"}]
    for name in ("one", "two"):
        compress.run(recipe, tmp_path / name, workspace=tmp_path / "work")
    assert len(asked) == 1  # what has been found is kept


def test_what_transformers_cannot_run_is_one_sentence(tiny_llama, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(CompressError, match=r"transformers cannot run it \(no such kernel\)"):
        check_source(open_source(str(tiny_llama)), TOKENS)


def test_the_check_says_nothing_and_leaves_loggers_as_they_were(tiny_llama, caplog):
    check_source(open_source(str(tiny_llama)), TOKENS)
    assert "meta device" not in caplog.text


@pytest.mark.slow
def test_nothing_stays_of_the_model_that_was_compared(tiny_llama):
    """Its modules and the hooks on them hold each other, so that it would, embedding and head with it, unless the hooks are taken off."""

    def models():
        return sum(issubclass(type(one), PreTrainedModel) for one in gc.get_objects())

    source = open_source(str(tiny_llama))
    gc.collect()
    gc.disable()
    try:
        before = models()
        check_source(source, torch.arange(8))
        assert models() == before
    finally:
        gc.enable()
