"""Small tasks in lm-eval's own terms, and a soft prompt for the tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).parent))  # tests import dry_run, which lies beside them

WORDS = ["fox", "dog", "quick brown", "lazy", "sleeps on"]


def _write_task(folder, name, items, **changes):
    """A task folder's YAML and data, from items with ``query``, ``choices`` and ``gold``."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | changes))


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """Two tasks of eight items with three choices, on words that the tiny model's tokenizer knows."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, start in (("animals", "the"), ("verbs", "and the dog jumps over the")):
        items = [
            {
                "query": f"{start} {WORDS[i % 5]} and the",
                "choices": [WORDS[(i + j) % 5] for j in (1, 2, 3)],
                "gold": i % 3,
            }
            for i in range(8)
        ]
        _write_task(folder, name, items)
    return folder


@pytest.fixture(scope="session")
def soft_prompt(compressed, tmp_path_factory):
    """A peft prompt-tuning adapter of five virtual tokens on the tiny compressed model, far from zero."""
    peft = pytest.importorskip("peft")
    import compress

    model = compress.load(compressed, dtype=torch.float32)
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with torch.no_grad():
        prompted.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("prompt") / "soft_prompt"
    prompted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_task():
    """Function (folder, name, items, **changes): a task's YAML and data."""
    return _write_task
