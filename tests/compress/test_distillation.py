"""The cached teacher and the loss, against the divergence over the whole vocabulary."""

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from compress.distillation import cache_teacher, distillation_loss
from compress.training import Batch

SAMPLES = [torch.arange(1, 9), torch.arange(20, 25)]
BATCH = Batch(
    torch.nn.utils.rnn.pad_sequence(SAMPLES, batch_first=True),
    torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),
    [0, 1],
)


@pytest.fixture(scope="module")
def models(make_model):
    load = AutoModelForCausalLM.from_pretrained
    return load(make_model("llama"), dtype=torch.float32), load(make_model("qwen2"), dtype=torch.float32)


@torch.no_grad()
def whole_divergence(student, teacher):
    total = 0.0
    for sample in SAMPLES:
        wanted, found = (model(sample[None]).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
        total += float(kl_div(found, wanted, log_target=True, reduction="sum"))
    return total


def test_with_the_whole_vocabulary_it_is_the_divergence(models, tmp_path):
    teacher, student = models
    cache_teacher(lambda: teacher, SAMPLES, 1000, tmp_path / "teacher.safetensors")
    loss = distillation_loss(tmp_path / "teacher.safetensors")
    assert float(loss(student, BATCH)) == pytest.approx(whole_divergence(student, teacher), rel=1e-4)
    assert float(loss(teacher, BATCH)) == pytest.approx(0, abs=1e-4)


def test_with_few_tokens_it_is_the_divergence_of_the_coarser_distribution(models, tmp_path):
    """All that is not listed is one event; the rest of it is the formula written out."""
    teacher, student = models
    cache_teacher(lambda: teacher, SAMPLES, 3, tmp_path / "teacher.safetensors")
    found = float(distillation_loss(tmp_path / "teacher.safetensors")(student, BATCH))
    expected = 0.0
    for sample in SAMPLES:
        wanted, got = (model(sample[None]).logits[0, :-1].softmax(-1).detach().double() for model in (teacher, student))
        for p, q in zip(wanted, got, strict=True):
            listed = p.argsort(descending=True)[:3]
            events = [(p[i], q[i]) for i in listed] + [(1 - p[listed].sum(), 1 - q[listed].sum())]
            expected += sum(float(a * (a / b).log()) for a, b in events)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found < whole_divergence(student, teacher)


def test_a_finished_cache_is_not_made_again(models, tmp_path):
    teacher, _ = models
    file = tmp_path / "teacher.safetensors"
    cache_teacher(lambda: teacher, SAMPLES, 2, file)
    made = file.stat().st_mtime_ns
    cache_teacher(lambda: pytest.fail("not needed"), SAMPLES, 2, file)
    assert file.stat().st_mtime_ns == made
