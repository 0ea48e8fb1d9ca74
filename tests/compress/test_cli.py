"""The command line through its real entry point: every verb, and every mistake in one line without a traceback."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compress import manifest
from compress.cli import app
from compress.cli.common import ProgressLines, duration
from compress.errors import CompressError
from compress.manifest import read_manifest

COMMAND = Path(sys.executable).with_name("compress")


def compress_command(*arguments, cwd=None):
    environment = {**os.environ, "COLUMNS": "160", "TERM": "dumb"}
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


@pytest.fixture
def said(command):
    """Standard output of a command that succeeds, without a new process."""

    def run(*arguments):
        code, text, error = command(*arguments)
        assert code == 0, error
        return text

    return run


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_run_and_look_at_the_result(recipe_file, tmp_path, text_file, said, command, verify):
    output = tmp_path / "model"
    made = compress_command("run", recipe_file, "-o", output, "--set", "passes.0.parent_bits=5")
    assert made.returncode == 0, made.stderr
    assert "read at 3 bits" in made.stdout
    found = json.loads(said("inspect", output, "--json"))
    assert list(found["bytes_at_bits"]) == list(found["divergence_at_bits"]) == ["3", "4", "5"]
    assert "estimated on calibration text, nats per token: " in said("inspect", output)
    assert "0.mlp.down_proj" in said("inspect", output)
    assert said("verify", output).count("ok ") == len(verify(output)) == 3
    other = tmp_path / "other.txt"
    other.write_text("the dog jumps over the fox.\nthe fox sleeps.\n" * 3)
    said("eval", output, "--text", other, "--bits", "3,5", "--separator", "\n", "--json", tmp_path / "eval.json")
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result["bits"]) == {"3", "5"}
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= result["bits"]["3"].keys()
    assert "calibrated or trained on" in command("eval", output, "--text", text_file)[2]
    text = said("generate", output, "the quick", "--bits", "4", "--max-new-tokens", "5")
    assert text.startswith("the quick")


def test_a_dense_model_can_be_measured_and_inspected(tiny_llama, text_file, said):
    result = json.loads(said("eval", tiny_llama, "--text", text_file, "--json", "-"))
    assert set(result["bits"]) == {"dense"}
    assert "MB of tensors" in said("inspect", tiny_llama)


def test_passes_and_schema(command):
    code, listing, _ = command("passes")
    assert code == 0
    assert all(kind in listing for kind in ("any_precision", "kmeans", "rtn"))
    assert "seed_bits" in command("passes", "any_precision")[1]
    assert "any_precision" in json.dumps(json.loads(command("schema")[1]))


def test_plan_reads_no_weights(recipe_file, tiny_llama, tmp_path, said):
    """Only headers: the data may even be missing."""
    folder = shutil.copytree(tiny_llama, tmp_path / "headers")
    foreseen = json.loads(said("plan", recipe_file, "--set", f"model={folder}", "--json"))
    assert list(foreseen["bytes_at_bits"]) == ["3", "4", "5", "6"]
    assert "MB of memory" in said("plan", recipe_file)


@pytest.mark.slow
def test_plan_foresees_the_time_if_asked(recipe_file, said):
    assert "minutes of processor time" in " ".join(said("plan", recipe_file, "--time").split())


AT_ONCE = (
    "import sys\n"
    "import compress_command\n"
    "try:\n"
    "    compress_command.main()\n"
    "except SystemExit as ended:\n"
    "    print('ended with', ended.code, *({'torch', 'transformers', 'numba', 'peft'} & sys.modules.keys()))\n"
)
"""Runs a command as its entry point does, and says which of the slow libraries it has imported."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["report", "--help"], 0),
        (["passes"], 0),
        (["passes", "soft_prompt"], 0),
        (["schema"], 0),
        (["inspect", "{model}", "--json"], 0),
        (["inspect", "{dense}"], 0),
        (["comprese"], 2),
        (["run"], 2),
        (["eval", "{model}", "--txet", "builtin"], 2),
        (["eval", "{model}"], 1),
        (["bench"], 1),
        (["compare", "{model}"], 1),
        (["generate", "{model}", "text", "--bits", "3,4"], 1),
        (["run", "{recipe}", "-o", "x", "--set", "passes.0.seed_bit=3"], 1),
        (["plan", "{recipe}", "--set", "passes.0.seed_bits=9"], 1),
    ],
)
def test_what_needs_no_model_answers_without_importing_torch(
    arguments, code, fresh_python, recipe_file, compressed, tiny_llama
):
    places = {"recipe": recipe_file, "model": compressed, "dense": tiny_llama}
    said = fresh_python(AT_ONCE, *(argument.format(**places) for argument in arguments))
    assert said.splitlines()[-1] == f"ended with {code}"


@pytest.mark.parametrize("verb", [item.name or item.callback.__name__ for item in app.registered_commands])
def test_every_verb_has_help(command, verb):
    code, text, _ = command(verb, "--help")
    assert code == 0
    assert f"compress {verb}" in text


@pytest.mark.slow
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
        (["eval", "{model}", "--text", "builtin", "--bits", "7"], "7 bits are not available"),
        (["eval", "{model}", "--text", "builtin", "--bits", "four"], "--bits 'four'"),
        (["generate", "{model}", "hello", "--bits", "2"], "2 bits are not available"),
        (["generate", "nowhere", "hello"], "not a model folder"),
        (["passes", "any"], "there is no pass 'any'"),
        (["eval", "{model}", "--text", "builtin", "--bits", "2,4"], "2 bits are not available"),
        (["eval", "{model}", "--text", "builtin", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (["eval", "{model}", "--text", "builtin", "--json", "no/x.json"], "as there is no folder no"),
        (["generate", "{model}", "{long}"], "the context has room for 64"),
        (["demo", "-o", "{recipe}"], "was not made by an earlier demo"),
        (["inspect", "{model}", "--plot", "no/x.png"], "cannot be drawn"),
        (["inspect", "{model}", "--plot", "x.nope"], "x.nope: cannot be drawn"),
        (["eval", "{model}"], "give --text FILE, --tasks NAMES, or both"),
        (["eval", "{model}", "--tasks", "x", "--agreement"], "give --text FILE too"),
        (["eval", "{model}", "--text", "builtin", "--prompt"], "holds no soft prompt"),
        (["eval", "{model}", "--text", "builtin", "--prompt", "--agreement"], "measured without a soft prompt"),
        (["eval", "{model}", "--text", "builtin", "--protocol", "2049"], "Did you mean '2048'?"),
        (["eval", "{model}", "--text", "builtin", "--protocol", "2048"], "the context holds 64; give --length"),
        (["eval", "{dense}", "--text", "builtin", "--dense"], "give --reference"),
        (["bench", "{model}", "--bits", "9", "--prompt-tokens", "8"], "9 bits are not available"),
        (["bench", "{model}", "--prompt-tokens", "99"], "the context holds 64; lower --prompt-tokens"),
        (["bench", "{model}", "--dtype", "int8"], "give float32, bfloat16 or float16"),
        (["bench", "nowhere"], "not a model folder or hub id"),
        (["report", "{dense}"], "has no compression.json"),
        (["compare", "{model}"], "give two checkpoints or more"),
        (["compare", "{model}", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_clear_line(
    arguments, message, recipe_file, compressed, tiny_llama, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"recipe": recipe_file, "model": compressed, "dense": tiny_llama, "long": "the dog " * 70}
    code, _, text = command(*(argument.format(**places) for argument in arguments))
    assert code == 1
    assert message in text
    assert text.startswith("error: ")
    assert "unexpected" not in text
    assert text.count("\n") == 1
    assert not list(tmp_path.glob("x*"))


def test_progress_in_a_log_is_a_line_per_unit_with_the_time_left():
    lines, now = [], [0.0]
    progress = ProgressLines(lines.append, lambda: now[0])
    for second, *step in [
        (0, "rtn: block 0", 0, 4),
        (0.5, "rtn: block 1", 1, 4),  # too soon after the last line
        (60, "rtn: block 2", 2, 4),
        (65, "rtn: block 2", 3, 4),  # the same unit, within ten seconds
        (90, "rtn: block 2", 3, 4),
        (91, "writing", 0, 1),
    ]:
        now[0] = second
        progress(*step)
    assert lines == [
        "rtn: block 0 (0 of 4)",
        "rtn: block 2 (2 of 4, about 60 s left)",
        "rtn: block 2 (3 of 4, about 30 s left)",
        "writing (0 of 1)",
    ]


@pytest.mark.slow
def test_a_run_tells_a_log_how_far_it_is(recipe_file, tmp_path, command):
    code, _, log = command("run", recipe_file, "-o", tmp_path / "model")
    assert code == 0
    assert log.startswith("comparing with transformers (0 of 1)\n")
    assert re.search(r"^\w.* \(\d+ of \d+", log, re.MULTILINE)


@pytest.mark.parametrize(
    ("seconds", "said"), [(7.4, "7 s"), (99, "99 s"), (725, "12 min"), (11100, "3 h 05 min"), (86400, "24 h 00 min")]
)
def test_durations_are_written_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_a_demo_deletes_no_folder_that_it_has_not_made(tmp_path, command):
    (tmp_path / "work").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "was not made by an earlier demo" in command("demo", "-o", tmp_path)[2]
    assert (tmp_path / "thesis.tex").exists()


def _without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def _with(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (_with("compression.json", "{}"), ["verify", "{}"], "has no 'compress_version', as every manifest has"),
        (_with("compression.json", "[1]"), ["inspect", "{}"], "as every manifest has"),
        (
            _without("compression.json"),
            ["generate", "{}", "the", "--bits", "3.5"],
            "give a whole number of bits, or patterns",
        ),
        (_without("tokenizer.json", "tokenizer_config.json"), ["generate", "{}", "the"], "its tokenizer cannot be"),
        (
            _with("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
            ["inspect", "{}"],
            "not a safetensors index",
        ),
        (
            _with("model.safetensors.index.json", '{"weight_map": {"a": "../../secret.safetensors"}}'),
            ["inspect", "{}"],
            "which is not in its folder",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(damage, arguments, message, compressed, tmp_path, command):
    folder = shutil.copytree(compressed, tmp_path / "model")
    damage(folder)
    code, _, text = command(*(argument.format(folder) for argument in arguments))
    assert code == 1
    assert message in text
    assert "unexpected" not in text


def test_logits_that_are_not_numbers_are_no_match(compressed):
    recorded = read_manifest(compressed)["probe"]["at_bits"]["3"]
    for found in (recorded | {"loss": math.nan}, recorded | {"top": [[i, math.nan] for i, _ in recorded["top"]]}):
        with pytest.raises(CompressError, match="computes other logits"):
            manifest._compare("3", recorded, found)


def test_a_flipped_bit_is_found(compressed, tmp_path, command):
    folder = shutil.copytree(compressed, tmp_path / "model")
    file = next(folder.glob("model-4bit-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "model-4bit-00001-of-00001.safetensors: its content has changed" in command("verify", folder)[2]


@pytest.mark.slow
def test_damage_that_hashes_do_not_cover_is_found_by_the_fresh_process(compressed, tmp_path, command):
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
    assert "at 3 bits a fresh process computes other logits" in command("verify", folder)[2]


@pytest.mark.slow
def test_a_full_disk(recipe_file, tmp_path):
    """A file system too small for the job: one line, no output, and the same command finishes elsewhere."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        result = compress_command("run", recipe_file, "-o", small / "model")
        *progress, line = result.stderr.strip().splitlines()
        assert result.returncode == 1
        assert line.startswith("error: ")
        assert "the disk is full" in line or "are free" in line
        assert all(" of " in step for step in progress)
        assert not (small / "model").exists()
    finally:
        subprocess.run(["umount", small], check=True)


HOLES = """
import sys
import numpy as np
from compress.cli.making import give_back_large_arrays

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) >> 10

if sys.argv[1] == "command":
    give_back_large_arrays()
np.ones(31 << 17)  # from the first that is freed glibc learns to keep others that large
before = own()
large, small = zip(*((np.ones(2 << 20), np.ones(1 << 16)) for _ in range(10)))
del large
print(own() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_run_gives_back_the_memory_of_large_arrays(fresh_python):
    """Of ten arrays of 16 MB, with small ones between them that stay."""
    assert int(fresh_python(HOLES, "command")) < 16
    assert int(fresh_python(HOLES, "by itself")) > 100
    assert int(fresh_python(HOLES, "command", MALLOC_MMAP_THRESHOLD_=str(1 << 30))) > 100
