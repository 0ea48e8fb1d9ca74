"""A recipe that ends in a soft prompt, and what it makes."""

import pytest

import compress

PROMPT = {"kind": "soft_prompt", "tokens": 5, "steps": 6, "batch": 2, "validate_every": 2, "warmup": 1}


@pytest.fixture
def prompt_recipe(recipe):
    recipe["passes"] = [
        {"kind": "prune", "score": "magnitude", "sparsity": 0.3},
        {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4},
        dict(PROMPT),
    ]
    recipe["calibration"] |= {"samples": 6}
    return recipe


@pytest.fixture(scope="session")
def prompted(tiny_llama, text_file, tmp_path_factory):
    """A finished checkpoint of 3 and 4 bits with a prompt for each, for tests that only read."""
    return compress.run(
        {
            "model": str(tiny_llama),
            "calibration": {"text": str(text_file), "samples": 6, "length": 32},
            "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}, {**PROMPT, "per_width": True}],
        },
        tmp_path_factory.mktemp("prompted") / "model",
    )
