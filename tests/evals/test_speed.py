"""The benchmark's figures are medians of the rounds, in turn, beside the dense model; nothing here asserts how fast anything is."""

import json
import shutil
import time

import pytest

import compress
from compress.errors import CompressError
from compress.evals import speed
from compress.evals.fresh import in_fresh_process
from compress.evals.speed import Load, bench
from compress.evals.store import Results
from compress.evals.timing import spread
from compress.hf import packed_modules
from compress.inspect import inspect

SMALL = Load(prompt=8, tokens=4, rounds=3, loads=1)


def test_median_and_quartiles_by_hand():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}


@pytest.fixture
def no_processes(monkeypatch):
    """Loading in fresh processes takes seconds; one test does it in earnest."""

    def loads(places, *_):
        return {name: {"load_seconds": [0.5], "resident_bytes": [1e6]} for name in places}

    monkeypatch.setattr(speed, "_fresh_loads", loads)


def test_every_width_beside_the_dense_model_in_turn(compressed, tiny_llama, no_processes, monkeypatch):
    turns, generate = [], speed._generate

    def watched(model, prompt, tokens):
        turns.append(compress.get_bits(model) if packed_modules(model) else "dense")
        return generate(model, prompt, tokens)

    monkeypatch.setattr(speed, "_generate", watched)
    store = Results(None)
    found = bench(str(compressed), [3, 6], load=SMALL, store=store)
    assert list(found["widths"]) == ["dense", "6", "3"]
    assert turns[:6] == ["dense", 6, 3, 6, 3, "dense"]  # the order rotates
    assert len(turns) == 4 * 3  # one round more than is counted
    assert found["backend"] == compress.backend()
    assert found["dense"] == str(tiny_llama)
    figures = found["widths"]["3"]
    assert figures["disk_bytes"] == inspect(compressed)["bytes_at_bits"]["3"]
    for name in ("decode_tokens_per_second", "prefill_tokens_per_second", "time_to_first_token_seconds"):
        assert 0 < figures[name]["low"] <= figures[name]["median"] <= figures[name]["high"]
    assert found["widths"]["dense"]["decode_versus_dense"]["median"] == 1
    assert store.rows("bench")[0]["result"] == found


def test_ratios_are_of_the_same_round(compressed, no_processes, monkeypatch):
    """A machine that is slower in one round changes no ratio."""
    slower = iter([1, 1, 1, 1, 5, 5, 2, 2])  # two candidates in the round that is not counted, and in three that are

    def generate(model, *_):
        cost = next(slower) * (3.0 if packed_modules(model) else 1.0)
        return cost, 2 * cost

    monkeypatch.setattr(speed, "_generate", generate)
    found = bench(str(compressed), [3], load=SMALL)["widths"]["3"]
    assert found["prefill_versus_dense"] == pytest.approx({"median": 1 / 3, "low": 1 / 3, "high": 1 / 3})
    assert found["time_to_first_token_seconds"]["median"] == 6.0
    assert found["decode_tokens_per_second"]["median"] == 1 / 12


@pytest.mark.slow
def test_a_dense_model_alone_loads_in_a_fresh_process(tiny_llama):
    start = time.perf_counter()
    found = bench(str(tiny_llama), load=Load(prompt=8, tokens=2, rounds=1, loads=1))["widths"]
    assert list(found) == ["dense"]
    assert 0 < found["dense"]["load_seconds"]["median"] < time.perf_counter() - start
    weights = (tiny_llama / "model.safetensors").stat().st_size
    assert weights < found["dense"]["resident_bytes"]["median"] < 1 << 30  # and what loading them imports


def test_without_the_dense_model_the_result_says_so(compressed, tmp_path, no_processes):
    folder = shutil.copytree(compressed, tmp_path / "model")
    manifest = json.loads((folder / "compression.json").read_text())
    manifest["recipe"]["model"] = "/gone/away"
    (folder / "compression.json").write_text(json.dumps(manifest))
    found = bench(str(folder), [3], load=SMALL)
    assert found["dense"].startswith("not measured: the dense model of")
    assert "decode_versus_dense" not in found["widths"]["3"]
    with pytest.raises(CompressError, match="no such folder"):
        bench(str(folder), [3], reference="/gone/away", load=SMALL)


def test_a_prompt_beyond_the_context_is_refused(compressed):
    with pytest.raises(CompressError, match=r"60 \+ 32 tokens: the context holds 64"):
        bench(str(compressed), [3], load=Load(prompt=60, tokens=32, rounds=1))


def test_changing_the_width_is_timed_where_there_are_widths(compressed, no_processes):
    start = time.perf_counter()
    found = bench(str(compressed), [3, 6], load=SMALL)["widths"]
    assert {name: "switch_seconds" in figures for name, figures in found.items()} == {
        "dense": False, "6": True, "3": True,
    }  # fmt: skip
    assert 0 < found["3"]["switch_seconds"]["low"] <= found["3"]["switch_seconds"]["high"] < time.perf_counter() - start


@pytest.mark.slow
def test_a_pruned_model_stands_beside_the_dense_one_that_is_given(tiny_llama, tmp_path, no_processes):
    passes = [{"kind": "mini_llm", "ratio": 0.3, "score": "magnitude", "compensate": False}]
    pruned = compress.run({"model": str(tiny_llama), "passes": passes}, tmp_path / "pruned")
    found = bench(str(pruned), reference=str(tiny_llama), load=SMALL)["widths"]
    assert list(found) == ["dense", "pruned"]
    assert found["pruned"]["disk_bytes"] == inspect(pruned)["bytes"] < found["dense"]["disk_bytes"]
    assert found["pruned"]["decode_versus_dense"].keys() == {"median", "low", "high"}


@pytest.mark.slow
def test_a_random_model_needs_no_checkpoint(command, no_processes, tmp_path):
    sizes = ("--prompt-tokens", "8", "--tokens", "2", "--rounds", "1", "--bits", "2,8")
    code, _, error = command("bench", "--random", "llama-tiny", *sizes, "--json", tmp_path / "found.json")
    assert code == 0, error
    found = json.loads((tmp_path / "found.json").read_text())["widths"]
    assert list(found) == ["dense", "8", "2"]
    assert found["2"]["disk_bytes"] < found["8"]["disk_bytes"]


def test_what_is_measured_is_said_once(command):
    assert "give a model's folder or --random NAME" in command("bench")[2]
    assert "give a model's folder or --random NAME" in command("bench", "x", "--random", "llama-1b")[2]
    assert "Did you mean 'llama-tiny'?" in command("bench", "--random", "llama-tinny")[2]


def test_a_script_that_fails_in_its_process_is_one_sentence():
    assert in_fresh_process("print('said before'); print(json.dumps({'got': request['a']}))", {"a": 3}) == {"got": 3}
    with pytest.raises(CompressError, match=r"a fresh process failed \(ValueError: no\)"):
        in_fresh_process("raise ValueError('no')", None)
