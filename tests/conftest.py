"""Tiny random models of every declared architecture, and a text to compress them on."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread makes models as tiny as these a third slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import filecmp
import json
import multiprocessing.connection
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.servers import interpret, plain_python  # noqa: F401

NESTED = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 6}
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40
COMMON = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
LLAMA_LIKE = {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), LLAMA_LIKE),
    "opt": {"hidden_size": 48, "ffn_dim": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 48},
    "gpt2": {"n_embd": 48, "n_inner": 100, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 4},
    "gpt_neox": {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "max_position_embeddings": 64},
}  # fmt: skip


HEADS = {**LLAMA_LIKE, "pad_token_id": 0}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
ROUTED = {
    **MIXTURE,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MODELS = {
    **dict.fromkeys(("apertus", "exaone4", "glm4", "granite", "olmo2", "phi3"), HEADS),
    "cohere2": {**HEADS, "sliding_window": 8},
    "gemma4_text": {
        **HEADS,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
    },
    "gemma3n_text": {
        **HEADS,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "laurel_rank": 8,
    },
    "zamba2": {
        **HEADS,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [2, 4],
        "attention_hidden_size": 96,
        "attention_head_dim": 24,
        "n_mamba_heads": 4,
        "mamba_headdim": 24,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "chunk_size": 8,
        "adapter_rank": 4,
    },
    "zaya": {**HEADS, **MIXTURE, "num_hidden_layers": 4, "num_experts_per_tok": 1, "router_hidden_size": 16},
    "falcon": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt_neo": {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "mamba2": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_heads": 4,
        "head_dim": 24,
        "state_size": 8,
        "n_groups": 1,
    },
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention", "conv"]},
    "deepseek_v3": {**HEADS, **ROUTED, **LATENT, "num_key_value_heads": 4},
    "granitemoe": {**HEADS, **MIXTURE},
    "mixtral": {**HEADS, **MIXTURE},
    "mamba": {"hidden_size": 48, "num_hidden_layers": 3},
    "openai-gpt": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "qwen3_moe": {**LLAMA_LIKE, **MIXTURE},
    "gpt_oss": {**LLAMA_LIKE, **MIXTURE, "intermediate_size": 16, "sliding_window": 8},
    "llama4_text": {
        **LLAMA_LIKE,
        "intermediate_size": 16,
        "intermediate_size_mlp": 100,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
    },
    "nemotron_h": {
        **LLAMA_LIKE,
        **MIXTURE,
        "n_routed_experts": 4,
        "layers_block_type": ["mamba", "moe", "attention"],
        "n_groups": 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 24,
        "ssm_state_size": 8,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 16,
        "chunk_size": 8,
    },
}
"""A sample of the types that are taken without a declaration, with tiny sizes."""
DECODER = {"d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 100, "pad_token_id": 1}


def pytest_addoption(parser):
    parser.addoption("--real", default=os.environ.get("COMPRESS_TEST_REAL"), help="folder of real models and text")


@pytest.fixture(scope="session")
def real(request):
    folder = request.config.getoption("--real")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real model: give --real FOLDER or COMPRESS_TEST_REAL")
    return Path(folder)


def save_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    wrapped.save_pretrained(folder)


def save_model(folder, kind="llama", dtype=torch.float32, **changes):
    """A tiny random model with larger weights than usual, so that every block matters."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = transformers.AutoConfig.for_model(
        kind, **{**COMMON, **({"bart": DECODER} | MODELS | CONFIGS)[kind], **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Folder of a tiny random model, by architecture and changes to its configuration; made once."""
    made = {}

    def make(kind="llama", **changes):
        key = (kind, *sorted(map(str, changes.items())))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(kind), kind, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_model):
    return make_model("llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def recipe(tiny_llama, text_file):
    """A complete recipe, as a mapping; tests change what they need."""
    return {
        "model": str(tiny_llama),
        "calibration": {"text": str(text_file), "samples": 4, "length": 32},
        "passes": [dict(NESTED)],
    }


@pytest.fixture(scope="session")
def make_packed(make_model, text_file, tmp_path_factory):
    """Folder of a checkpoint to read only, by passes, architecture and changes to its configuration; made once."""
    import compress

    made = {}

    def make(passes=(NESTED,), kind="llama", samples=4, **changes):
        key = json.dumps([passes, kind, samples, changes])
        if key not in made:
            text = {"text": str(text_file), "samples": samples, "length": 32}
            recipe = {"model": str(make_model(kind, **changes)), "calibration": text, "passes": list(passes)}
            made[key] = compress.run(recipe, tmp_path_factory.mktemp("packed") / "model")
        return made[key]

    return make


@pytest.fixture(scope="session")
def compressed(make_packed):
    """One finished checkpoint for tests that only read."""
    return make_packed()


@pytest.fixture(scope="session")
def prompted(tiny_llama, text_file, tmp_path_factory):
    """A finished checkpoint of 3 and 4 bits with a prompt for each, for tests that only read."""
    import compress

    prompt = {"kind": "soft_prompt", "tokens": 5, "steps": 6, "batch": 2, "validate_every": 2, "per_width": True}
    return compress.run(
        {
            "model": str(tiny_llama),
            "calibration": {"text": str(text_file), "samples": 6, "length": 32},
            "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}, prompt],
        },
        tmp_path_factory.mktemp("prompted") / "model",
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``compress`` in this process: (exit code, standard output, standard error)."""

    from compress.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def stream(model, tokens):
    """Run a streamed model block by block; return what its last block gives."""
    hidden, calls = model.capture(tokens)
    for index, call in enumerate(calls):
        with model.block(index) as block:
            hidden = model.run(block, hidden, call)
    return hidden


def assert_same_files(left, right):
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(right)) for path in right.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


@pytest.fixture(scope="session")
def library_server():
    """Context whose processes come from a server that has imported the library and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "compress.pipeline",
            "compress.quant.any_precision",
            "compress.pruning.structured.mini_llm",
            "compress.prompts.soft_prompt",
            "pytest",  # the first thing that each of them imports
        ]
    )
    return context


@pytest.fixture(scope="session")
def kill_and_finish(library_server):
    """Run a recipe in processes that are killed at random moments, each once a new unit is there, until one finishes."""
    import compress

    def finished(work, unit):
        try:
            return set(work.glob(unit))
        except FileNotFoundError:  # the run ends, and removes its work while we look
            return set()

    def run(recipe, output, kills, unit="*/*.safetensors", pause=0.1):
        work, draw, killed = output.with_name(output.name + ".work"), random.Random(0), 0
        while not output.exists():
            process = library_server.Process(target=compress.run, args=(recipe, output))
            before = finished(work, unit)
            process.start()
            if killed < kills:
                while process.is_alive() and not finished(work, unit) - before:
                    time.sleep(0.001)
                time.sleep(draw.random() * pause)
                process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            assert output.exists() or process.exitcode != 0
            killed += process.exitcode != 0
        assert killed
        assert process.exitcode != 0 or not work.exists()  # killed between the two, it leaves its work

    return run


@pytest.fixture(scope="session")
def strangers_folder(tmp_path_factory):
    """A stranger's package, installed somewhere of its own: the passes that CONTRIBUTING.md shows."""
    folder = tmp_path_factory.mktemp("stranger")
    source = shutil.copytree(Path(__file__).parent / "stranger", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", folder / "installed", source], check=True, capture_output=True)
    return folder / "installed"


@pytest.fixture(scope="session")
def fresh_python():
    """Run code in a new process; returns what it printed. With ``fails=True`` returns what it complained of."""

    def run(code, *arguments, fails=False, **environment):
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        if fails:
            assert process.returncode != 0, process.stdout
            return process.stderr
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


PROLOGUE = """
import io, os, sys
sys.argv, sys.stdin = ["-c", *arguments], io.StringIO(text)
sys.path[:0] = path
os.environ.update(environment)
for name, descriptor in outputs.items():
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
"""


@pytest.fixture(scope="session")
def own_process(library_server, tmp_path_factory):
    """Start code in a process of its own that has the library; returns it and what to call for what it said in the end.

    Much quicker than :func:`fresh_python`, whose processes begin with nothing.
    """

    def start(code, *arguments, text="", path=(), **environment):
        folder = tmp_path_factory.mktemp("process")
        outputs = {str(folder / "stdout"): 1, str(folder / "stderr"): 2}
        arguments, path = list(map(str, arguments)), list(map(str, path))
        names = {"arguments": arguments, "text": text, "path": path, "environment": environment, "outputs": outputs}
        process = library_server.Process(target=exec, args=(PROLOGUE + code, {"__name__": "__main__", **names}))
        process.start()

        def finish():
            process.join()
            said = [Path(name).read_text() for name in outputs]
            return subprocess.CompletedProcess(code, process.exitcode, *said)

        return process, finish

    return start


@pytest.fixture
def run_code(own_process):
    """Run code in a process of its own that has the library; returns what it printed."""

    def run(code, *arguments, **more):
        process = own_process(code, *arguments, **more)[1]()
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


@pytest.fixture
def run_ranks(own_process):
    """Run code in several processes that know of one another, with one thread each; where one fails, the others are told to stop.

    ``torchrun`` does the same, and imports everything in each.
    """

    def run(ranks, code, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        code = "import torch\ntorch.set_num_threads(1)\n" + code
        numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **place} for rank in range(ranks)]
        started = [own_process(code, *arguments, **number) for number in numbers]
        waiting = {process.sentinel: process for process, _ in started}
        while waiting:
            for sentinel in multiprocessing.connection.wait(list(waiting)):
                process = waiting.pop(sentinel)
                process.join()
                for other in waiting.values() if process.exitcode else ():
                    other.terminate()
        ended = [finish() for _, finish in started]
        said = ("".join(getattr(process, stream) for process in ended) for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(code, max(abs(process.returncode) for process in ended), *said)

    return run


@pytest.fixture
def verify(own_process, monkeypatch):
    """``compress.manifest.verify``, which asks a process that need not import everything again."""
    from compress import manifest

    def answer(command, *, input, **_):
        _, _, code, folder = command
        return own_process(code, folder, text=input)[1]()

    monkeypatch.setattr(manifest, "subprocess", SimpleNamespace(run=answer))
    return manifest.verify


@pytest.fixture
def quick_loads(run_code, monkeypatch):
    """``compress bench``, whose fresh processes need not import everything again; what they measure is not what it should be."""
    from compress.evals import fresh, speed

    def answer(code, request):
        return json.loads(run_code(fresh._BEFORE + code, json.dumps(request)).splitlines()[-1])

    monkeypatch.setattr(speed, "in_fresh_process", answer)
