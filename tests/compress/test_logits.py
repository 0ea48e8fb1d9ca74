"""The logits of a long text and a large vocabulary are made a part at a time, and are the same."""

import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress import logits as module
from compress.distillation import cache_teacher, distillation_loss, likeliest, listed_divergence
from compress.evals.perplexity import Text, Window, score
from compress.kv_serving import losses_by_blocks
from compress.logits import Predictions, run_inside, token_losses
from compress.prompts.stored import new_prompt
from compress.training import Batch, next_token_loss, predictions
from tests.conftest import COMMON, CONFIGS, MODELS

KINDS = ("llama", "gpt2", "opt", "gemma2", "gemma3_text", "granite", "cohere2", "mamba", "qwen3_moe")
SCALED = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere2": {"logit_scale": 0.5},
}


def build(kind="llama", **changes):
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **({**MODELS, **CONFIGS})[kind], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def texts(rows=2, length=23):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))


class Largest(TorchDispatchMode):
    """Remember the most numbers that a result had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.fixture
def in_parts(monkeypatch):
    """Let five positions of two texts be in memory at a time."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 300 * 10)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_made_in_parts_are_the_model_s(kind, in_parts):
    model, tokens = build(kind, **SCALED.get(kind, {})), texts()
    whole = model(input_ids=tokens, use_cache=False).logits
    found = Predictions(model, tokens)
    assert [part.stop - part.start for part in found.parts()] == [5, 5, 5, 5, 2]
    assert torch.allclose(torch.cat([found.logits(part) for part in found.parts()], 1), whole[:, :-1], atol=1e-5)
    losses = cross_entropy(whole[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(token_losses(model, tokens), losses, atol=1e-5)


@pytest.mark.parametrize("wanted", [range(1), range(4, 9), range(20, 22), range(23)])
def test_positions_that_are_wanted(wanted, in_parts):
    model, tokens = build(), texts()
    whole = model(input_ids=tokens, use_cache=False).logits[:, wanted.start : wanted.stop]
    found = Predictions(model, tokens, wanted)
    assert torch.allclose(torch.cat([found.logits(part) for part in found.parts()], 1), whole, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_behind_a_prompt_gradients_are_the_same(method, monkeypatch):
    model, tokens = build(), texts()
    prompted = new_prompt(model, method, torch.randn(4, 48 if method == "prompt" else 2 * 3 * 24))
    scored = torch.ones(2, 22, dtype=torch.bool)
    parameters = [parameter for parameter in prompted.parameters() if parameter.requires_grad]
    found = {}
    for limit in (1 << 28, 4 * 300 * 10):
        monkeypatch.setattr(module, "LOGITS_BYTES", limit)
        loss = next_token_loss(prompted, Batch(tokens, scored, [0, 1]))
        found[limit] = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    whole, parts = found.values()
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(whole, parts, strict=True))
    assert whole[1].abs().max() > 0


def test_what_a_dense_model_says_in_parts(tmp_path, monkeypatch):
    dense, model, tokens = build(), build(rms_norm_eps=0.1), texts()
    batch = Batch(tokens, torch.ones(2, 22, dtype=torch.bool), [0, 1])
    found = []
    for limit in (1 << 28, 4 * 300 * 10):
        monkeypatch.setattr(module, "LOGITS_BYTES", limit)
        file = tmp_path / str(limit)
        cache_teacher(lambda: dense, list(tokens), 8, file)
        whole = listed_divergence(model, tokens, *likeliest(dense, tokens, 300)).sum()
        found.append((distillation_loss(file)(model, batch), whole))
    assert found[0][0] > 0
    assert found[0][1] > 0
    assert torch.allclose(torch.stack(found[0]), torch.stack(found[1]), rtol=1e-4)


def test_losses_by_blocks_of_a_cache_in_parts(in_parts):
    model, tokens = build(), texts()
    cache = transformers.DynamicCache(config=model.config)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    wanted = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(losses_by_blocks(model, tokens, cache, 9), wanted, atol=1e-5)


@pytest.mark.slow
def test_no_tensor_is_larger_than_stated():
    """A vocabulary as large as Gemma 3's: all logits of this batch would be 630 MB."""
    model = build(vocab_size=1 << 18, hidden_size=8, head_dim=8, num_hidden_layers=1, intermediate_size=8)
    windows = [Window(list(range(300)), 299)] * 2
    with Largest() as seen:
        found = score(model, Text(windows, 600))
    assert found.tokens == 598
    assert 4 * seen.numbers <= module.LOGITS_BYTES
    with Largest() as seen:
        run_inside(model, texts(4, 300))
    assert seen.numbers == model.lm_head.weight.numel()


def test_another_thread_s_calls_keep_all_their_logits(in_parts):
    model, tokens, sizes = build(), texts(), []

    def call(*_):
        def other():
            with torch.no_grad():
                sizes.append(model.lm_head(torch.zeros(1, 7, 48)).shape)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with model.model.register_forward_hook(call):
        Predictions(model, tokens)
    assert sizes == [(1, 7, 300)]


def test_a_model_without_a_head_of_its_own_is_run_as_it_is():
    model, tokens = build(), texts()

    class Around(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return model(input_ids=input_ids, use_cache=use_cache)

    assert torch.equal(token_losses(Around(), tokens), token_losses(model, tokens))
    assert torch.equal(Predictions(Around(), tokens).logits(slice(0, 22)), predictions(model, tokens))


def test_losses_are_exact_to_the_fifth_digit():
    """With frequent tokens first, as vocabularies have them, a sum in their order loses the many small exponentials at the end."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 40, 49152, generator=generator) - torch.arange(49152.0).log1p()
    tokens = torch.randint(100, (2, 40), generator=generator)

    class Given(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=logits)

    exact = cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    assert float(token_losses(Given(), tokens).double().mean()) == pytest.approx(float(exact), abs=4e-5)
