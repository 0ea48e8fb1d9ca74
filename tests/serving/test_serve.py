"""The command that starts a server: what it chooses, refuses and would run; servers themselves are in engine/."""

import json
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import compress
from compress.cli import engines
from compress.cli.common import app
from compress.cli.engines import Serving, choose_engine, make_view, served_bits, vllm_command
from compress.config import StoredConfig, read_settings
from compress.errors import CompressError
from compress.hub import located
from compress.quant.records import GroupedShape
from compress.vllm.settings import Settings, legal_degrees, unserved

RECORD = {"out_features": 8, "in_features": 8, "seed_bits": 2, "parent_bits": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "small"
    quantise = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 4, "objective": "weight", "sensitivity": "none"}
    compress.run({"model": "builtin", "passes": [quantise]}, folder)
    return folder


def serving(folder, **changes):
    return Serving(folder, Settings(**changes), "127.0.0.1", 8000, None, ())


def present(monkeypatch, *names):
    monkeypatch.setattr(engines, "find_spec", lambda name: name if name in names else None)


def test_vllm_is_taken_where_it_is_and_fits(monkeypatch, checkpoint):
    present(monkeypatch, "vllm")
    assert choose_engine(checkpoint, None, "llama") == ("vllm", "")


def test_without_vllm_transformers_own_server_is_taken(monkeypatch, checkpoint):
    present(monkeypatch, "fastapi", "uvicorn", "openai")
    assert choose_engine(checkpoint, None, "llama") == ("transformers", "vLLM is not installed")
    assert choose_engine(checkpoint, "transformers", "llama") == ("transformers", "")
    with pytest.raises(CompressError, match="vLLM cannot serve it: vLLM is not installed; --engine transformers can"):
        choose_engine(checkpoint, "vllm", "llama")


def test_what_the_other_server_lacks_is_named(monkeypatch, checkpoint):
    present(monkeypatch, "openai")
    with pytest.raises(CompressError, match=r"needs fastapi, uvicorn: pip install 'transformers\[serving\]'"):
        choose_engine(checkpoint, None, "llama")
    with pytest.raises(CompressError, match="--engine x: there are vllm and transformers"):
        choose_engine(checkpoint, "x", "llama")


@pytest.mark.parametrize(
    ("config", "model_type", "reason"),
    [
        ({"format_version": 1, "modules": {"a": RECORD}}, "llama", None),
        ({"format_version": 1, "modules": {"a": RECORD}}, "gpt2", "turns the matrices of GPT-2"),
        ({"format_version": 5, "modules": {"mlp.experts.up": {**RECORD, "experts": 2}}}, "mixtral", "packed experts"),
        (
            {"format_version": 3, "pruned": {"b": {"heads": 2, "key_value_heads": 2, "channels": 3}}},
            "llama",
            "blocks are of different sizes",
        ),
        (
            {"format_version": 4, "modules": {"embed": {**RECORD, "rank": 1, "read_at": {"4": 4}}}},
            "opt",
            "vLLM's class for opt takes no packed embedding",
        ),
    ],
)
def test_what_vllm_cannot_serve(config, model_type, reason):
    found = unserved(StoredConfig(**config), model_type)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("config", "degrees"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 500, "vocab_size": 2048}, [1, 2]),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}, [1, 3]),
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}, [1, 2, 4, 8, 16, 32]),
        ({"n_head": 12, "n_embd": 768, "vocab_size": 50257}, [1, 2, 3, 4, 6, 12]),
        ({"text_config": {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 9}}, [1, 2, 4]),
    ],
)  # fmt: skip
def test_degrees_of_tensor_parallelism(config, degrees):
    assert legal_degrees(config) == degrees


@pytest.mark.parametrize(
    ("heads", "inner", "degrees"), [(9, 1536, [1, 3]), (4, 1536, [1, 2, 4]), (4, 640, [1, 2]), (4, 600, [1])]
)
def test_groups_of_columns_are_not_split(heads, inner, degrees):
    config = {"num_attention_heads": heads, "intermediate_size": inner, "hidden_size": 64 * heads, "vocab_size": 0}
    grouped = GroupedShape(64, 64, 2, 4, rank=1, group=64)
    assert legal_degrees(config, [grouped]) == degrees


def test_the_command_for_vllm(monkeypatch, checkpoint):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    asked = Settings(8, None, 8, 3, by_load="8,4")
    command, environment = vllm_command(Serving(checkpoint, asked, "::1", 9, "key", ("--max-model-len", "64")), True)
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    said = dict(pairwise(command))
    assert json.loads(said["--additional-config"]) == {
        "compress": {"bits": 8, "held_bits": 8, "draft_bits": 3, "by_load": "8,4"}
    }
    assert json.loads(said["--speculative-config"])["model"] == str(checkpoint)
    assert said["--middleware"] == "compress.vllm.http.BitsMiddleware"
    assert said["--worker-extension-cls"] == "compress.vllm.switching.BitsExtension"
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(command)
    assert command[-2:] == ["--max-model-len", "64"]
    assert "key" not in command  # other users of the machine can read it there
    assert (environment["VLLM_API_KEY"], environment["VLLM_CPU_KVCACHE_SPACE"]) == ("key", "2")
    assert "--enforce-eager" not in vllm_command(serving(checkpoint), on_cpu=False)[0]


def test_bytes_are_those_of_the_bits_that_are_kept(checkpoint):
    at = {bits: served_bits(checkpoint, Settings(bits))[1] for bits in (2, 4)}
    assert at[2] < at[4] == served_bits(checkpoint, Settings(2, held_bits=4))[1]
    assert set(served_bits(checkpoint, Settings(3))[0].values()) == {3}
    with pytest.raises(CompressError, match="9 bits are not available"):
        served_bits(checkpoint, Settings(9))


def test_a_dense_model_has_no_bits(checkpoint):
    builtin = Path(located("builtin", {})[0])
    assert served_bits(builtin, Settings())[0] == {}
    with pytest.raises(CompressError, match="is not a compressed checkpoint, so it has no bits to choose from"):
        served_bits(builtin, Settings(4))


@pytest.mark.slow
def test_a_view_is_the_checkpoint_at_some_bits(checkpoint, tmp_path):
    make_view(checkpoint, dict.fromkeys(read_settings(checkpoint).modules, 3), tmp_path / "view")
    assert compress.get_bits(compress.load(tmp_path / "view")) == 3
    assert all(path.is_symlink() == (path.name != "config.json") for path in (tmp_path / "view").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9", "--engine", "vllm"], "9 bits are not available; this model can be read at 2 to 4 bits"),
        (["--bits", "2,3"], "--bits '2,3': give one number of bits"),
        (["--bits-by-load", "3,4"], "--bits-by-load '3,4': give two or more"),
        (["--bits-by-load", "4,1"], "1 bits are not available; this model can be read at 2 to 4 bits"),
        (["--draft-bits", "7"], "7 bits are not available; this model can be read at 2 to 4 bits"),
        (["--engine", "transformers", "--held-bits", "4"], "--held-bits: transformers' server cannot do this"),
        (["--engine", "transformers", "--api-key", "x"], "--api-key: transformers' server cannot do this"),
        (["--engine", "transformers", "--", "--seed", "1"], "what follows --: transformers' server cannot do this"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(monkeypatch, checkpoint, arguments, message):
    present(monkeypatch, "vllm", "fastapi", "uvicorn", "openai")
    found = CliRunner().invoke(app, ["serve", str(checkpoint), *arguments])
    assert isinstance(found.exception, CompressError)
    assert message in str(found.exception)


def test_an_address_in_use_is_refused(monkeypatch, checkpoint):
    present(monkeypatch, "vllm")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", str(port)])
    assert f"127.0.0.1:{port} cannot be listened at (Address already in use)" in str(found.exception)


@pytest.mark.slow
def test_help_needs_neither_torch_nor_vllm(fresh_python):
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'vllm'): sys.modules[name] = None\n"
        "sys.argv = ['compress', 'serve', '--help']\n"
        "import compress_command\n"
        "try: compress_command.main()\n"
        "except SystemExit as end: print('code', end.code)"
    )
    assert "code 0" in fresh_python(code)
