"""A real vLLM in this process says, token for token, what ``compress.load`` says in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_helpers import PROMPTS, greedy, tokens_of

import compress
from compress.vllm.matrices import packed_parts

EXTENSION = "compress.vllm.switching.BitsExtension"


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("row", 2),
        ("row", 4),
        ("row", None),
        ("row", "3.5"),
        ("row", {"re:.*mlp.*": 3}),
        ("shared", 2),
        ("shared", 4),
        ("shared", None),
        ("sparse", 3),
        ("mixed", None),
        ("one layer dense", None),
        ("qwen2", 3),
        ("gemma3_text", 3),
    ],
)
def test_greedy_tokens_are_those_of_the_library(checkpoints, engine, name, bits):
    folder = checkpoints(name)
    wanted = greedy(folder, bits)
    overrides = {} if bits is None else {"compress_bits": bits}
    assert tokens_of(engine(folder, hf_overrides=overrides)) == wanted


def test_bits_by_memory_and_by_the_configuration_of_the_engine(checkpoints, engine):
    folder = checkpoints("row")
    wanted = greedy(folder, None, memory="5.2MB")
    assert tokens_of(engine(folder, additional_config={"compress": {"memory": "5.2MB"}})) == wanted


def test_bits_change_while_the_engine_runs(checkpoints, engine):
    folder = checkpoints("shared")
    wanted = {bits: greedy(folder, bits) for bits in (2, 3, 5)}
    overrides = {"compress_bits": 3, "compress_held_bits": 5}
    llm = engine(folder, hf_overrides=overrides, worker_extension_cls=EXTENSION, enable_prefix_caching=False)
    assert llm.collective_rpc("compress_bits") == [{"bits": 3, "held": [2, 5]}]
    assert tokens_of(llm) == wanted[3]
    for bits in (5, 2, 3):
        assert llm.collective_rpc("compress_set_bits", args=(bits,)) == [None]
        assert tokens_of(llm) == wanted[bits]
    (wrong,) = llm.collective_rpc("compress_set_bits", args=(6,))
    assert "6 bits are not in memory, which has 2 to 5; start the server with --held-bits" in wrong
    assert tokens_of(llm) == wanted[3]


def test_bits_change_in_compiled_code(checkpoints, engine):
    """vLLM drops the guards of compiled code: what it holds for a constant stays one."""
    folder = checkpoints("row")
    wanted = {bits: greedy(folder, bits) for bits in (2, 5)}
    overrides = {"compress_bits": 2, "compress_held_bits": 5}
    llm = engine(folder, hf_overrides=overrides, worker_extension_cls=EXTENSION, enforce_eager=False)
    assert tokens_of(llm) == wanted[2]
    llm.collective_rpc("compress_set_bits", args=(5,))
    llm.reset_prefix_cache()
    assert tokens_of(llm) == wanted[5]


def test_a_draft_of_fewer_bits_changes_no_token(checkpoints, engine):
    """And shares the planes of its target, where those are in memory."""
    folder = checkpoints("row")
    wanted = greedy(folder, 6)
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    settings = {"bits": 6, "held_bits": 6, "draft_bits": 3}
    llm = engine(folder, speculative_config=draft, additional_config={"compress": settings})
    assert tokens_of(llm) == wanted
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    target, guesses = packed_parts(runner.get_model()), packed_parts(runner.drafter.model)
    assert {part.bits for part in target.values()} == {6}
    assert {part.bits for part in guesses.values()} == {3}
    for names, part in guesses.items():
        own = {tensor.data_ptr() for tensor in target[names].buffers()}
        assert {tensor.data_ptr() for tensor in part.buffers()} == own


def test_a_prompt_of_embeddings(checkpoints, engine):
    """As a soft prompt is given to vLLM: vectors before those of the text."""
    folder = checkpoints("shared")
    wanted = greedy(folder, 4)
    embed = compress.load(folder, bits=4, dtype=torch.float32).get_input_embeddings()
    llm = engine(folder, hf_overrides={"compress_bits": 4}, enable_prompt_embeds=True)
    prompts = [{"prompt_embeds": embed(torch.tensor(prompt)).detach()} for prompt in PROMPTS]
    assert tokens_of(llm, prompts) == wanted


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"compress_bits": 9}, "9 bits are not available; this model can be read at 2 to 6 bits."),
        ({"compress_bit": 3}, "there is no such setting of compress. Did you mean 'bits'?"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_sentence(checkpoints, engine, overrides, message):
    with pytest.raises(compress.CompressError, match=message.replace("?", r"\?")):
        engine(checkpoints("row"), hf_overrides=overrides)


APART = """
import json, sys
from engine_helpers import tokens_of
from vllm import LLM
if __name__ == "__main__":
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
    print("TOKENS", json.dumps(tokens_of(LLM(sys.argv[1], **usual, **json.loads(sys.argv[2])))))
"""


@pytest.mark.parametrize(
    ("name", "options", "environment"),
    [
        ("row", {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        ("llama", {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        ("shared", {"model_impl": "transformers"}, {}),
    ],
    ids=["two processes", "two processes, shared codebooks", "model of transformers"],
)
def test_an_engine_in_other_processes(checkpoints, tmp_path, name, options, environment):
    """Split in two, the second half of 500 inputs begins within a word of the planes; the embedding is split by rows."""
    folder, script = checkpoints(name), tmp_path / "apart.py"
    script.write_text(APART)
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(script), str(folder), json.dumps({"hf_overrides": {"compress_bits": 3}, **options})]
    done = subprocess.run(
        command, env={**os.environ, **more, **environment}, capture_output=True, text=True, timeout=600
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS ")), "")
    assert line, done.stderr[-2000:]
    assert json.loads(line.removeprefix("TOKENS ")) == greedy(folder, 3)
