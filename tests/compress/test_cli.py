"""The command line through its real entry point: every verb, and every mistake in one line without a traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compress import cli

COMMAND = Path(sys.executable).with_name("compress")


def compress_command(*arguments, cwd=None):
    environment = {**os.environ, "COLUMNS": "160", "TERM": "dumb"}
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def said(*arguments, cwd=None):
    """Standard output of a command that succeeds."""
    result = compress_command(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def complaint(*arguments, cwd=None):
    """The one line of a command that fails."""
    result = compress_command(*arguments, cwd=cwd)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def in_process(monkeypatch, capsys):
    """The same without a new process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_run_and_look_at_the_result(recipe_file, tmp_path, text_file):
    output = tmp_path / "model"
    assert "read at 3 bits" in said("run", recipe_file, "-o", output, "--set", "passes.0.parent_bits=5")
    found = json.loads(said("inspect", output, "--json"))
    assert list(found["bytes_at_bits"]) == ["3", "4", "5"]
    assert "0.mlp.down_proj" in said("inspect", output)
    assert said("verify", output).count("ok ") == 3
    other = tmp_path / "other.txt"
    other.write_text("the dog jumps over the fox.\nthe fox sleeps.\n" * 3)
    said("eval", output, "--text", other, "--bits", "3,5", "--separator", "\n", "--json", tmp_path / "eval.json")
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result["bits"]) == {"3", "5"}
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= result["bits"]["3"].keys()
    assert "calibrated or trained on" in complaint("eval", output, "--text", text_file)
    text = said("generate", output, "the quick", "--bits", "4", "--max-new-tokens", "5")
    assert text.startswith("the quick")


def test_a_dense_model_can_be_measured_and_inspected(tiny_llama, text_file):
    result = json.loads(said("eval", tiny_llama, "--text", text_file, "--json", "-"))
    assert set(result["bits"]) == {"dense"}
    assert "MB of tensors" in said("inspect", tiny_llama)


def test_passes_and_schema(in_process):
    code, listing, _ = in_process("passes")
    assert code == 0
    assert all(kind in listing for kind in ("any_precision", "kmeans", "rtn"))
    assert "seed_bits" in in_process("passes", "any_precision")[1]
    assert "any_precision" in json.dumps(json.loads(in_process("schema")[1]))


def test_plan_reads_no_weights(recipe_file, tiny_llama, tmp_path):
    """Only headers: the data may even be missing."""
    folder = shutil.copytree(tiny_llama, tmp_path / "headers")
    foreseen = json.loads(said("plan", recipe_file, "--set", f"model={folder}", "--json"))
    assert list(foreseen["bytes_at_bits"]) == ["3", "4", "5", "6"]
    assert "MB of memory" in said("plan", recipe_file)


@pytest.mark.parametrize("verb", ["run", "plan", "inspect", "verify", "eval", "generate", "passes", "schema", "demo"])
def test_every_verb_has_help(in_process, verb):
    code, text, _ = in_process(verb, "--help")
    assert code == 0
    assert f"compress {verb}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "recipe nowhere.yaml: cannot be read"),
        (["run", "{recipe}"], "no output folder"),
        (["run", "{recipe}", "-o", "x", "--set", "passes.0.seed_bit=3"], "Did you mean 'seed_bits'?"),
        (["run", "{recipe}", "-o", "x", "--set", "passes.0.kind=any_presicion"], "Did you mean 'any_precision'?"),
        (["run", "{recipe}", "-o", "x", "--set", "passes.0.seed_bits=9"], "less than or equal to 8"),
        (["run", "{recipe}", "-o", "x", "--set", "passes.0.seed_bits=7"], "must not exceed parent_bits"),
        (["run", "{recipe}", "-o", "x", "--set", "model=nowhere"], "no such folder"),
        (["run", "{recipe}", "-o", "x", "--set", "model=someone/something"], "the hub did not deliver it"),
        (["run", "{recipe}", "-o", "x", "--set", "calibration.text=no.txt"], "text file no.txt: cannot be read"),
        (["run", "{recipe}", "-o", "x", "--set", "calibration.samples=9999"], "calibration.samples: 9999 asked for"),
        (["run", "{recipe}", "-o", "x", "--set", "calibration.length=4000"], "context holds 64"),
        (["run", "{recipe}", "-o", "x", "--set", "device=tpu"], "device"),
        (["run", "{recipe}", "-o", "x", "--set", "device=cuda:7"], "device"),
        (["inspect", "nowhere"], "is nowhere a model folder?"),
        (["verify", "nowhere"], "has no compression.json"),
        (["eval", "nowhere", "--text", "builtin"], "not a model folder or hub id"),
        (["eval", "{model}", "--text", "no.txt"], "text file no.txt: cannot be read"),
        (["eval", "{model}", "--text", "builtin", "--bits", "7"], "width 7 is not available"),
        (["eval", "{model}", "--text", "builtin", "--bits", "four"], "--bits 'four'"),
        (["generate", "{model}", "hello", "--bits", "2"], "width 2 is not available"),
        (["generate", "nowhere", "hello"], "not a model folder"),
        (["passes", "any"], "there is no pass 'any'"),
    ],
)
def test_mistakes_end_in_one_clear_line(arguments, message, recipe_file, compressed, tmp_path, in_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, text = in_process(*(argument.format(recipe=recipe_file, model=compressed) for argument in arguments))
    assert code == 1
    assert message in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_flipped_bit_is_found(compressed, tmp_path):
    folder = shutil.copytree(compressed, tmp_path / "model")
    file = next(folder.glob("model-4bit-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "model-4bit-00001-of-00001.safetensors: its content has changed" in complaint("verify", folder)


def test_damage_that_hashes_do_not_cover_is_found_by_the_fresh_process(compressed, tmp_path):
    """Someone rewrote a table and the manifest with it: the recorded logits still tell."""
    import hashlib

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(compressed, tmp_path / "model")
    file = next(folder.glob("model-3bit-*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.codebook_3"] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((folder / "compression.json").read_text())
    data = file.read_bytes()
    manifest["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "compression.json").write_text(json.dumps(manifest))
    assert "at 3 bits a fresh process computes other logits" in complaint("verify", folder)


def test_a_full_disk(recipe_file, tmp_path):
    """A file system too small for the job: one line, no output, and the same command finishes elsewhere."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        line = complaint("run", recipe_file, "-o", small / "model")
        assert "the disk is full" in line or "are free" in line
        assert not (small / "model").exists()
    finally:
        subprocess.run(["umount", small], check=True)
