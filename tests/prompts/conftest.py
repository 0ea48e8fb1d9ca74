"""A recipe that ends in a soft prompt."""

import pytest

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
