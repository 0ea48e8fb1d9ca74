"""The table of soft prompts and controls, on a tiny model: every cell is filled, once."""

import pytest

from compress.errors import CompressError
from compress.evals import prompts
from compress.evals.perplexity import Text, Window
from compress.evals.prompts import Bench, fill_all, tables
from compress.prompts.settings import SoftPromptConfig
from compress.settings import Calibration

TEXTS = {
    "text": Text([Window(list(range(1, 30)), 28)], 50),
    "other": Text([Window(list(range(30, 50)), 19)], 40),
}


def open_bench(model, text_file, out, levels):
    text = Calibration(text=str(text_file), samples=4, length=24)
    settings = SoftPromptConfig(tokens=3, steps=2, batch=2, validate_every=2, held_out=2)
    return Bench(out, str(model), text, {"text": text, "other": text}, settings, levels, lambda *_: None)


def test_every_cell_is_filled_and_a_second_run_measures_nothing(tiny_llama, text_file, tmp_path, monkeypatch):
    levels = ["3 bits", "50 % + 4 bits"]
    bench = open_bench(tiny_llama, text_file, tmp_path, levels)
    fill_all(bench, TEXTS)
    expected = tables(bench, "perplexity")
    assert "| its own prefix | – | – |" in expected
    assert (tmp_path / "transfer.svg").exists()
    for line in ("no prompt", "untrained prompt", "its own prompt", "the dense model's prompt", "LoRA"):
        cells = next(row for row in expected.splitlines() if row.startswith(f"| {line} |")).split("|")[2:-1]
        assert len(cells) == 3 and all(float(cell) > 1 for cell in cells)
    monkeypatch.setattr(prompts, "measure", None)
    monkeypatch.setattr(Bench, "train", None)
    bench = open_bench(tiny_llama, text_file, tmp_path, levels)
    fill_all(bench, TEXTS)
    assert tables(bench, "perplexity") == expected


def test_lora_has_as_many_trained_numbers(tiny_llama, text_file, tmp_path):
    """Of q_proj 96 per rank and block, k_proj 72, v_proj 72, …: three blocks."""
    bench = open_bench(tiny_llama, text_file, tmp_path, ["3 bits"])
    assert bench.lora_of(96 * 3) == (["q_proj"], 1)
    assert bench.lora_of(2 * (96 + 72 + 72) * 3) == (["q_proj", "k_proj", "v_proj"], 2)
    with pytest.raises(CompressError, match="there is no '5 bits'"):
        open_bench(tiny_llama, text_file, tmp_path, ["5 bits"])
