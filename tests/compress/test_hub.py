"""A model is opened the same way everywhere, and all that belongs to it comes along."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import compress
from compress import hub, loading, models
from compress.errors import CompressError
from compress.manifest import read_manifest
from compress.recipe import load_recipe

TOKENS = torch.arange(5, 25)[None]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def in_cache(folder, base, name="me/small"):
    """Put a model into a hub cache under ``base``, as a download would have."""
    place = base / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    return name


@pytest.fixture(scope="module")
def openings(compressed, tmp_path_factory):
    """A hub cache with one checkpoint, and a repository that has it in a subfolder."""
    base = tmp_path_factory.mktemp("hub")
    in_cache(compressed, base / "cache")
    shutil.copytree(compressed, base / "repository" / "inner")
    in_cache(base / "repository", base / "cache", "me/nested")
    return base


@pytest.mark.parametrize(
    ("place", "keywords"),
    [
        ("me/small", {"cache_dir": "cache"}),
        ("repository", {"subfolder": "inner"}),
        ("me/nested", {"cache_dir": "cache", "subfolder": "inner"}),
    ],
)
@pytest.mark.parametrize("bits", [4, "3.5"])
def test_what_finds_the_files_goes_to_every_opening(openings, compressed, place, keywords, bits):
    """Weights, configuration, index of the bits, and for a mean the manifest."""
    keywords = {key: str(openings / "cache") if key == "cache_dir" else value for key, value in keywords.items()}
    folder = place if place.startswith("me/") else str(openings / place)
    found = compress.load(folder, bits=bits, **keywords)
    assert torch.equal(found(TOKENS).logits, compress.load(compressed, bits=bits)(TOKENS).logits)


def test_prompts_are_found_in_a_subfolder_too(prompted, tmp_path):
    shutil.copytree(prompted, tmp_path / "outer" / "inner")
    found = compress.load(tmp_path / "outer", bits=3, prompt=True, subfolder="inner")
    expected = compress.load(prompted, bits=3, prompt=True)
    assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)


def test_settings_of_the_model_are_taken_as_from_pretrained_takes_them(compressed, tmp_path):
    assert compress.load(compressed, use_cache=False).config.use_cache is False
    given = AutoConfig.from_pretrained(compressed)
    before = given.to_dict()
    assert compress.get_bits(compress.load(compressed, bits=3, config=given)) == 3
    assert given.to_dict() == before
    model, information = compress.load(compressed, bits=4, output_loading_info=True)
    assert not information["missing_keys"]
    assert compress.get_bits(model) == 4
    # The configuration of a loaded model, or of a dense one, says nothing of what the files have.
    for config in (compress.load(compressed, bits=3).config, compressed):
        assert compress.get_bits(compress.load(compressed, config=config)) == 6
    dense = AutoConfig.from_pretrained(compressed)
    del dense.quantization_config
    assert compress.get_bits(compress.load(compressed, config=dense)) == 6


def test_a_token_goes_to_every_opening_and_is_written_nowhere(tiny_llama, recipe, tmp_path, monkeypatch):
    seen = []
    for name, module in (("AutoConfig", loading), ("AutoTokenizer", loading), ("AutoModelForCausalLM", models)):
        theirs = getattr(module, name)

        class Watched(theirs):
            @staticmethod
            def from_pretrained(*args, theirs=theirs, name=name, **kwargs):
                seen.append((name, kwargs.get("token")))
                return theirs.from_pretrained(*args, **kwargs)

        monkeypatch.setattr(module, name, Watched)
    compress.load(tiny_llama, token="secret")
    loading.load_tokenizer(tiny_llama, token="secret")
    assert set(seen) == {(name, "secret") for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    downloads = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **given: downloads.append(given) or tiny_llama
    )
    asked = {"name": "me/private", "revision": "v1", "token": "secret", "cache_dir": str(tmp_path / "cache")}
    recipe |= {"model": asked, "passes": [{"kind": "rtn", "bits": 4}]}
    output = compress.run(recipe, tmp_path / "made", workspace=tmp_path / "work")
    (download,) = downloads
    assert {key: download[key] for key in ("revision", "token", "cache_dir")} == {
        key: asked[key] for key in ("revision", "token", "cache_dir")
    }
    assert read_manifest(output)["recipe"]["model"] == {key: asked[key] for key in ("name", "revision", "cache_dir")}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert "secret" not in repr(load_recipe(recipe))


def test_a_recipe_names_a_subfolder(tiny_llama, recipe, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "outer" / "inner")
    model = {"name": str(tmp_path / "outer"), "subfolder": "inner"}
    output = compress.run({**recipe, "model": model, "passes": [{"kind": "rtn"}]}, tmp_path / "made")
    assert hub.model_folder(read_manifest(output)["recipe"]["model"]) == tmp_path / "outer" / "inner"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "x", "revison": "v1"}}, "revison is not a known key. Did you mean 'revision'"),
        ({"model": {"name": "x", "revision": "v1"}, "revision": "v2"}, "give revision once"),
        ({"model": {"revision": "v1"}}, "name is missing"),
        ({"model": {"name": "x", "local_files_only": "maybe"}}, r"recipe: model\.local_files_only: input should be"),
        ({"model": 5}, r"recipe: model: input should be a valid string \(got 5\)"),
    ],
)
def test_mistakes_in_a_models_mapping(recipe, changes, message):
    with pytest.raises(CompressError, match=message):
        load_recipe({**recipe, **changes})


def test_builtin_is_known_everywhere(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compress.load("builtin").config.model_type == "llama"
    assert command("inspect", "builtin")[0] == 0
    code, said, _ = command("generate", "builtin", "import", "--max-new-tokens", 2)
    assert (code, said.startswith("import")) == (0, True)
    (tmp_path / "builtin").mkdir()
    with pytest.raises(CompressError, match="there is a folder of that name too"):
        compress.load("builtin")


def test_all_that_belongs_to_a_model_comes_along(tiny_llama, recipe, tmp_path):
    """Named chat templates lie in a folder of their own; what is called like a file of ours but is a folder does not."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": CHAT, "tool_use": "TOOLS " + CHAT}
    tokenizer.save_pretrained(source)
    for name in ("tokenizer", "vocab.d", "LICENSE"):
        (source / name).mkdir()
    (source / "NOTICE").symlink_to(source / "nowhere")
    (source / "tekken.json").write_text("{}")
    output = compress.run({**recipe, "model": str(source), "passes": [{"kind": "rtn"}]}, tmp_path / "made")
    said = [{"role": "user", "content": "Hi"}]
    for template in (None, "tool_use"):
        made, wanted = (
            AutoTokenizer.from_pretrained(place).apply_chat_template(said, chat_template=template, tokenize=False)
            for place in (output, source)
        )
        assert made == wanted
    assert {"tekken.json", "additional_chat_templates/tool_use.jinja"} <= read_manifest(output)["files"].keys()
    assert not {"tokenizer", "vocab.d", "LICENSE", "NOTICE"} & {path.name for path in output.iterdir()}


def test_what_is_downloaded_is_what_belongs_to_a_model(monkeypatch, tmp_path):
    """One rule for both: whatever is copied beside the weights is fetched too."""
    wanted = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns, **_: wanted.extend(allow_patterns) or tmp_path
    )
    hub.model_folder("me/small")
    names = (
        "additional_chat_templates/a.jinja",
        "qwen.tiktoken",
        "LICENSE",
        "vocab.txt",
        "tokenizer.model",
        "config.json",
    )
    for name in (*names, "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        assert any(Path(name).match(pattern) for pattern in wanted), name
    assert not any(Path(name).match(pattern) for pattern in wanted for name in ("pytorch_model.bin", "modeling.py"))


def test_without_a_hub_the_name_is_in_the_sentence(monkeypatch):
    def refused(*_, **__):
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(CompressError, match=r"'me/gone': is no folder, and the hub did not deliver it \(offline\)"):
        hub.model_folder("me/gone")
    for name in ("./me/gone", "gone"):
        with pytest.raises(CompressError, match="there is no such folder"):
            hub.model_folder(name)


def test_an_adapter_in_the_models_own_folder_is_refused(tiny_llama, recipe, tmp_path):
    """transformers would put it on the model, unasked, and we would not."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CompressError, match="has a peft adapter beside its weights"):
        compress.run({**recipe, "model": str(source)}, tmp_path / "no")


def test_a_dense_model_is_loaded_with_every_keyword(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "outer" / "inner")
    model, information = compress.load(tmp_path / "outer", subfolder="inner", use_cache=False, output_loading_info=True)
    assert (model.config.use_cache, list(information["missing_keys"])) == (False, [])
    assert torch.equal(model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(tiny_llama)(TOKENS).logits)


def test_a_recipe_is_opened_at_another_revision_and_with_a_token(recipe):
    chosen = load_recipe({**recipe, "model": "me/small", "revision": "v1"}).opened("v2", "secret")
    assert chosen.source == {"name": "me/small", "revision": "v2", "token": "secret"}
    assert "secret" not in json.dumps(chosen.record())
    assert load_recipe(recipe).opened(None, None) == load_recipe(recipe)
    assert load_recipe({**recipe, "model": {"name": "me/small", "subfolder": "in"}}).opened("v2", None).source == {
        "name": "me/small",
        "subfolder": "in",
        "revision": "v2",
    }


def test_revision_and_token_are_options_of_what_names_a_recipe(command, recipe, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **given: asked.append(given) or recipe["model"]
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe, "model": "me/small", "passes": [{"kind": "rtn"}]}))
    assert command("plan", path, "--revision", "v2", "--token", "secret")[0] == 0
    assert (asked[0]["revision"], asked[0]["token"]) == ("v2", "secret")


def test_a_gguf_file_is_named_or_chosen(tmp_path, monkeypatch):
    (tmp_path / "some-Q8.gguf").touch()
    (tmp_path / "some-F16.gguf").touch()
    assert hub.model_folder(str(tmp_path / "some-Q8.gguf")) == tmp_path / "some-Q8.gguf"
    with pytest.raises(CompressError, match=r"holds GGUF files; name one, such as some-F16\.gguf, in model\.gguf_file"):
        hub.model_folder(str(tmp_path))
    for name in ("none.gguf", "owner/none.gguf"):
        with pytest.raises(CompressError, match=rf"model '{name}': there is no such folder or file"):
            hub.model_folder(name)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **given: asked.append(given) or tmp_path)
    model = {"name": "owner/some-GGUF", "gguf_file": "some-Q8.gguf"}
    assert hub.model_folder(model) == tmp_path / "some-Q8.gguf"
    wanted = asked[0]["allow_patterns"]
    assert {"some-Q8.gguf", "tokenizer*", "LICENSE*"} < set(wanted)
    assert "*.safetensors" not in wanted
    with pytest.raises(CompressError, match=r"has no file 'some-Q4\.gguf', which model\.gguf_file names"):
        hub.model_folder({**model, "gguf_file": "some-Q4.gguf"})
