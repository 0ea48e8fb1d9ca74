"""Commands and measurements with a packed cache in the loop."""

import json
import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

import compress
from compress.evals.bench.kv import side_by_side
from compress.evals.kv import CachedLosses, KVWanted, bytes_of, decode_speed, kv_wanted
from compress.evals.perplexity import prepare, score
from compress.kv_serving import make_caches
from compress.kv_settings import KVSettings
from compress.loading import load_tokenizer

SMALL = ("--kv-group", "4:12", "--kv-residual", "8")


@pytest.fixture
def model(compressed):
    return compress.load(compressed, bits=4)


@pytest.mark.parametrize("batch", [1, 1000])
def test_blocks_with_a_whole_cache_score_what_one_call_does(model, compressed, batch):
    text = prepare(
        ["the quick brown fox jumps over the lazy dog. " * 3, "the dog sleeps on"], load_tokenizer(compressed), 40
    )
    plain = score(model, text, batch)
    losses = CachedLosses(lambda: DynamicCache(config=model.config), 7)
    blocks = score(model, text, batch, None, losses)
    assert (blocks.tokens, blocks.bytes) == (plain.tokens, plain.bytes)
    assert math.isclose(blocks.loss, plain.loss, rel_tol=1e-5)
    assert losses.bytes >= losses.tokens * 3 * 2 * 2 * 12 * 4


def test_blocks_do_not_matter_much_to_a_packed_cache(model, compressed):
    """Token by token is what is served; a block sees a few tokens more as they are."""
    text = prepare(["the quick brown fox jumps over the lazy dog. " * 4], load_tokenizer(compressed), 60)
    make = make_caches(model, 3, KVSettings(group=(4, 12), residual=8))
    one, four = (score(model, text, 1, None, CachedLosses(make, block)).loss for block in (1, 4))
    plain = score(model, text).loss
    assert one != plain
    assert abs(four - plain) <= 3 * abs(one - plain) + 0.05


def test_eval_measures_text_with_packed_caches_and_keeps_what_it_measured(command, compressed, text_file, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(text_file.read_text()[:400] + "other")
    options = (
        "--text",
        text,
        "--bits",
        "4",
        "--length",
        "50",
        "--kv-bits",
        "4,3:2",
        *SMALL,
        "--results",
        tmp_path / "r.jsonl",
    )
    code, out, err = command("eval", compressed, *options, "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert found["kv"].keys() == {"4", "3:2"}
    row = found["kv"]["3:2"]["4"]
    assert row["tokens"] == found["bits"]["4"]["tokens"]
    assert 0 < row["kv_bytes"] < found["kv"]["4"]["4"]["kv_bytes"]
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    code, out, _ = command("eval", compressed, *options)
    assert code == 0
    assert "bytes per token" in out
    assert (tmp_path / "r.jsonl").read_text().splitlines() == lines


def test_generate_with_a_packed_cache(command, compressed):
    code, out, err = command(
        "generate",
        compressed,
        "the quick",
        "--bits",
        "4",
        "--max-new-tokens",
        "4",
        "--kv-bits",
        "4",
        "--kv-group",
        "32",
    )
    assert (code, out) == (1, "")
    assert "does not divide the 12 channels" in err
    assert err.count("\n") == 1
    code, out, err = command(
        "generate", compressed, "the quick", "--bits", "4", "--max-new-tokens", "4", "--kv-bits", "4", *SMALL
    )
    assert code == 0, err
    assert out.startswith("the quick")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "builtin", "--kv-bits", "1"), "give 2 to 8"),
        (("--text", "builtin", "--kv-bits", "4", "--kv-group", "x"), "--kv-group 'x'"),
        (("--text", "builtin", "--kv-group", "32"), "give --kv-bits too"),
        (("--tasks", "builtin_line", "--kv-bits", "4"), "is measured on text"),
    ],
)
def test_bad_options_end_in_one_sentence(command, compressed, arguments, message):
    code, _, err = command("eval", compressed, *arguments)
    assert code == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--kv-bits", "1"), "give 2 to 8"),
        (("bench", "--draft-bits", "few"), "few"),
        (("bench", "--draft-bits", "3", "--draft-text", "nowhere.txt"), "nowhere.txt"),
        (("bench", "--kv-bits", "4", "--kv-group", "32"), "does not divide the 12 channels"),
        (("eval", "--text", "builtin", "--kv-bits", "4", "--kv-group", "32"), "does not divide the 12 channels"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_read(command, compressed, arguments, message, monkeypatch):
    read = []
    for name in ("compress.evals.speed.bench", "compress.evals.evaluate.OpenModel.__init__"):
        monkeypatch.setattr(name, lambda *args, **kwargs: read.append(args))
    code, out, err = command(arguments[0], compressed, *arguments[1:])
    assert (code, out, read) == (1, "", [])
    assert message in err


def test_decoding_is_timed_in_turn(model):
    wanted = KVWanted([4, 2], KVSettings(group=(4, 12), residual=8))
    found = decode_speed(model, wanted, 40, tokens=1, rounds=2)
    assert found.keys() == {"plain", "4", "2"}
    assert found["2"]["bytes"] < found["4"]["bytes"] < found["plain"]["bytes"]
    assert found["plain"]["versus_plain"]["median"] == 1


def test_bytes_are_found_within_what_wraps_them():
    whole = torch.zeros(4, 8)

    class Holder:
        def __init__(self):
            self.parts = [{"a": whole[:2]}, (whole, torch.zeros(3, dtype=torch.int8))]
            self.itself = self

    assert bytes_of(Holder()) == 4 * 8 * 4 + 3


def test_options_of_the_command_line():
    found = kv_wanted("4,4:2", "128:64", 16)
    assert list(found.bits) == [4, (4, 2)]
    assert (found.settings.groups, found.settings.residual) == ((128, 64), 16)


def test_caches_are_read_side_by_side_and_one_that_fails_is_said(model, capsys):
    settings = KVSettings(group=(4, 12), residual=8)

    def broken():
        raise RuntimeError("no such backend\nmore")

    makers = {
        "plain": lambda: DynamicCache(config=model.config),
        "broken": broken,
        "8 bits": make_caches(model, 8, settings),
        "2 bits": make_caches(model, 2, settings),
    }
    windows = [list(range(1, 41)), list(range(41, 81))]
    found = side_by_side(model, windows, makers, 4)
    assert list(found) == ["plain", "8 bits", "2 bits"]
    assert "broken: not measured (RuntimeError: no such backend)" in capsys.readouterr().out
    assert found["plain"]["divergence"] == found["plain"]["error"] == 0
    assert 0 < found["8 bits"]["divergence"] < found["2 bits"]["divergence"]
    assert found["2 bits"]["bytes"] < found["8 bits"]["bytes"] < found["plain"]["bytes"]
    with torch.no_grad():
        whole = model(torch.tensor(windows)).logits[:, :-1].log_softmax(-1)
    expected = -whole.gather(-1, torch.tensor(windows)[:, 1:, None]).mean()
    assert math.isclose(found["plain"]["loss"], float(expected), rel_tol=1e-5)
