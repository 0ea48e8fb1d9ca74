"""Several processes on one model: the same bytes, whatever their number."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

import compress
from compress import cli
from compress.errors import CompressError
from compress.quant.nested import nested_output_codebooks
from compress.quant.shared_search import shared_output_codebooks
from compress.ranks import LOTS, Ranks, Sums, _in_threads, even_parts
from tests.conftest import assert_same_files

LAUNCH = ("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
NESTED = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 6}
PRUNE = {"kind": "prune", "score": "sparsegpt", "allocation": "mrp", "sparsity": 0.5}
PASSES = {
    "rows": [NESTED],
    "shared": [{**NESTED, "seed_bits": 2, "codebooks": "shared"}],
    "weight": [{**NESTED, "objective": "weight"}],
    "kmeans": [{"kind": "kmeans", "bits": 3, "sensitivity": "activation"}],
    "pruned": [PRUNE, {"kind": "rtn", "bits": 4}],
    "joint": [{"kind": "joint", "bits": 4, "sparsity": 0.5, "allocation": "owl"}],
    "cut": [{"kind": "mini_llm", "ratio": 0.2, "mode": "global", "score": "output"}],
    "taylor": [{"kind": "mini_llm", "ratio": 0.2}],
    "blocks": [{"kind": "mini_llm", "ratio": 0.3, "remove": "blocks", "score": "output"}],
    "mixture": [NESTED],
    "cache": [{"kind": "rtn"}, {"kind": "kv_calibrate", "choices": [2, 4], "residual": 4, "group": 4}],
}
TRAINED = {
    "tuned": [NESTED, {"kind": "tune_tables", "widths": [3], "steps": 6, "batch": 3, "length": 10}],
    "recovered": [PRUNE, {"kind": "lora_recovery", "rank": 2, "steps": 6, "batch": 3}],
}
"""Trainings, which sum gradients in another order."""


def launch(ranks, code, *arguments):
    """Run Python in several processes by ``torchrun``."""
    command = [sys.executable, *LAUNCH, f"--nproc-per-node={ranks}", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def assert_trained_alike(left, right):
    """Codes are the same, and what was trained differs by what rounding in another order makes of it."""
    files = sorted(path.relative_to(left) for path in left.rglob("*.safetensors"))
    assert files
    for file in files:
        one, two = load_file(left / file), load_file(right / file)
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
        whole = [name for name, tensor in one.items() if not tensor.is_floating_point()]
        assert all(torch.equal(one[name], two[name]) for name in whole)


@contextmanager
def threads_of_torch(count):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def test_lots_are_shared_out_and_none_is_left():
    for count in (1, 3, 8, 21):
        for size in (1, 2, 3, 4, 11):
            lots = [Ranks(rank, size).lots(count) for rank in range(size)]
            assert sorted(sample for own in lots for lot in own for sample in lot) == list(range(count))
            assert len({len(own) for own in lots}) == 1
        assert [lot for rank in range(2) for lot in Ranks(rank, 2).lots(count)] == Ranks().lots(count)
    whole = Ranks().lots(21)
    assert len(whole) == LOTS
    assert [own for turn in zip(*(Ranks(rank, 3).lots(21) for rank in range(3)), strict=True) for own in turn][
        :8
    ] == whole


def test_work_is_dealt_out_by_its_size():
    costs = {"q": 3, "k": 1, "gate": 9, "up": 9, "down": 9}
    shares = [Ranks(rank, 2).share(costs) for rank in range(2)]
    assert shares == [["k", "gate", "down"], ["q", "up"]] or shares == [["gate", "down"], ["q", "k", "up"]]


def test_parts_of_rows_do_not_depend_on_processes():
    assert [part.stop - part.start for part in even_parts(576, 1024)] == [144] * 4
    assert [part.stop - part.start for part in even_parts(4608, 1024)] == [576] * 8
    assert even_parts(100, 1024) == [slice(0, 100)]
    assert even_parts(0, 1024) == [slice(0, 0)]


@pytest.mark.parametrize(("threads", "each"), [(1, 1), (3, 1), (16, 2)])
def test_parts_are_worked_on_at_once_and_share_the_threads(threads, each):
    seen = set()

    def work(part):
        seen.add(get_ident())
        return {"of": torch.tensor([part, torch.get_num_threads(), torch.is_grad_enabled()])}

    with threads_of_torch(threads), torch.no_grad():
        found = [part["of"].tolist() for part in Ranks().over(range(8), work)]
        assert torch.get_num_threads() == threads
    assert found == [[part, each, False] for part in range(8)]
    assert (get_ident() in seen) == (threads == 1)


@pytest.mark.parametrize("own", [1, 2, 4])
def test_the_threads_of_a_part_do_not_depend_on_how_many_parts_a_process_has(own):
    """So any number of processes computes the same."""
    with threads_of_torch(8):
        assert _in_threads(lambda part: torch.get_num_threads(), range(own), 4) == [2] * own
        assert torch.get_num_threads() == 8


def test_what_fails_in_a_thread_fails_as_it_would_without():
    def work(part):
        raise CompressError(f"part {part} has no weights.")

    with threads_of_torch(2):
        with pytest.raises(CompressError, match="part 0 has no weights"):
            Ranks().over(range(4), work)
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("search", [nested_output_codebooks, lambda *given: shared_output_codebooks(*given)[0]])
def test_any_number_of_threads_finds_the_same_codes(search):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(200, 64, generator=generator), torch.randn(256, 64, generator=generator)
    hessian = inputs.t() @ inputs / 256 + 0.1 * torch.eye(64)
    found = []
    for threads in (1, 2, 4):
        with threads_of_torch(threads):
            found.append(search(dict.fromkeys((3, 4, 5), weight), hessian))
    for other in found[1:]:
        assert torch.equal(found[0].codes, other.codes)
        for bits in (3, 4, 5):
            assert torch.equal(found[0].codebooks[bits], other.codebooks[bits])


def test_sums_are_those_of_the_lots_of_each_half_in_order():
    """Of numbers whose sum depends on the order, two to a lot."""
    sums = Sums(Ranks())
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8, 3.0, 5.0, 1e8, 7.0, 0.5, -1e8, 9.0)]
    for first in range(0, len(parts), 2):
        sums.add("x", parts[first].clone())
        sums.add("x", parts[first + 1].clone())
        sums.end_lot(first)
    lots = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    assert sums.total["x"] == (((lots[0] + lots[1]) + lots[2]) + lots[3]) + lots[4]
    assert sums.notes == [0, 2, 4, 6, 8]


def test_tensors_of_any_kind_arrive_as_they_were(monkeypatch):
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3, dtype=torch.float64),
        "number": torch.tensor(0.5, dtype=torch.float64),  # behind three bytes
        "large": torch.randn(300, 1000).t(),
        "half": torch.randn(5).bfloat16(),
    }
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append(tensor.clone()))
    next(Ranks(0, 2).each(tensors, {"loss": 0.1}))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.copy_(sent.pop(0)))
    heard, note = next(Ranks(1, 2).each({}))
    assert note == {"loss": 0.1}
    assert list(heard) == list(tensors)
    assert all(torch.equal(heard[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(2, (*PASSES, *TRAINED)), (3, ("rows", "pruned"))])
def test_several_processes_write_the_bytes_of_one(ranks, names, recipe, make_model, tmp_path, run_ranks):
    """Every pass that divides its work; more samples than lots, and rows enough for several parts."""
    recipe["calibration"]["samples"] = 11
    recipes = {}
    for name in names:
        passes = (PASSES | TRAINED)[name]
        kind, changes = ("mixtral", {}) if name == "mixture" else ("llama", {"intermediate_size": 260})
        changes |= {"num_hidden_layers": 3 if name == "blocks" else 2}
        text = {**recipe["calibration"], "length": 40 if name == "cache" else 24}
        recipes[name] = {**recipe, "model": str(make_model(kind, **changes)), "calibration": text, "passes": passes}
    code = (
        "import compress, json, sys\n"
        "for output, recipe in json.loads(sys.argv[1]).items():\n"
        "    compress.run(recipe, output)\n"
    )
    given = json.dumps({str(tmp_path / f"{name}-ranks"): one for name, one in recipes.items()})
    process = run_ranks(ranks, code, given)
    assert process.returncode == 0, process.stderr
    with threads_of_torch(1):  # as each of several processes has
        for name, one in recipes.items():
            compress.run(one, tmp_path / name)
            check = assert_trained_alike if name in TRAINED else assert_same_files
            check(tmp_path / name, tmp_path / f"{name}-ranks")


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "by_torchrun"), [(0, True), (1, False)])
def test_a_rank_that_dies_is_named_and_another_number_continues(
    dies, by_torchrun, recipe, make_model, tmp_path, run_ranks
):
    recipe["model"] = str(make_model("llama", intermediate_size=260))
    output, written = tmp_path / "killed", tmp_path / "recipe.yaml"
    written.write_text(json.dumps(recipe))
    script = Path(__file__).with_name("ranked.py")
    start, code = (launch, script) if by_torchrun else (run_ranks, script.read_text())
    process = start(2, code, written, output, dies, 6)
    assert process.returncode != 0
    assert time.time() - (tmp_path / "killed.work.killed").stat().st_mtime < 60
    said = f"rank {dies} of 2 has ended before the work was done; what is finished is kept: run again"
    assert " ".join(process.stderr.split()).count(said) == 1, process.stderr
    work = tmp_path / "killed.work"
    there = {path.name for path in work.glob("*/*.safetensors")}
    assert len(there) >= 6
    assert not output.exists()
    with threads_of_torch(1):  # as each of several processes has
        compress.run(recipe, output)
        compress.run(recipe, tmp_path / "whole")
    assert_same_files(output, tmp_path / "whole")
    assert not work.exists()


@pytest.mark.slow
def test_a_launcher_that_stops_the_others_at_once_does_not_silence_them(tmp_path, run_ranks):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from compress.errors import CompressError\n"
        "from compress.ranks import Ranks\n"
        "ranks = Ranks.at_work(torch.device('cpu'))\n"
        "try:\n"
        "    with ranks.together(Path(sys.argv[1])):\n"
        "        if ranks.rank: os._exit(1)\n"
        "        ranks.wait()\n"
        "except CompressError as error:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(error)"
    )
    assert run_ranks(2, code, tmp_path).stdout.startswith("rank 1 of 2 has ended before the work was done")


@pytest.mark.slow
def test_a_smaller_number_of_threads_than_the_cores_is_kept(run_ranks):
    """Sums depend on it, and accelerate sets another where the launcher has not said how many threads there are."""
    code = (
        "import os\n"
        "os.environ['OMP_NUM_THREADS'] = '0'\n"
        "from compress.ranks import Ranks\n"
        "assert Ranks.at_work(torch.device('cpu')).size == 2\n"
        "print(torch.get_num_threads())"
    )
    process = run_ranks(2, code)
    assert process.stdout.split() == ["1", "1"], process.stderr


@pytest.mark.slow
def test_what_is_wrong_for_all_is_said_once(recipe, tmp_path, run_ranks):
    recipe["passes"] = [{"kind": "tune_tables"}]
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(recipe))
    code = "from compress.cli import main\nmain()"
    process = run_ranks(2, code, "run", written, "-o", tmp_path / "model")
    assert process.returncode != 0
    assert process.stderr.count("works on packed matrices; put a quantising pass before it.") == 1


def test_what_is_wrong_for_one_alone_is_said_by_it(monkeypatch, capsys):
    """The main process is given time to say it first, and is not there here."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["compress", "inspect", "nowhere"])
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert waited == [cli.MAIN_SPEAKS]
    assert capsys.readouterr().err.startswith("error: rank 1: nowhere")
