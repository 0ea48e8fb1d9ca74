"""Try every type of model that transformers has, tiny and random, with every kind of work: ``python -m tests.every [TYPE…]``.

One line of JSON for each type: column -> "yes", or why not; then what all come to. It fails where something works no longer that
does by docs/models.md, and where anything is neither done nor refused in a sentence. Each type is tried in a process of its own.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import compress
from compress.errors import CompressError
from compress.loading import read_config
from compress.models import auto_class
from compress.vllm.settings import unserved
from tests import zoo
from tests.conftest import TEXT

COLUMNS = ("quantise", "load", "generate", "prune", "prompt", "tune", "lora", "structured", "vllm")
QUANTISE = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}
PRUNE = {"kind": "prune", "score": "wanda", "allocation": "uniform", "sparsity": 0.5}
TRAIN = {"steps": 1, "batch": 1, "validate_every": 1}
TUNE, LORA = {"kind": "tune_tables", "steps": 1, "batch": 1}, {"kind": "lora_recovery", **TRAIN}
PROMPT = {"kind": "soft_prompt", "tokens": 4, **TRAIN}
STRUCTURED = {"kind": "mini_llm", "ratio": 0.1, "mode": "local"}
SECONDS = 300


def attempt(work):
    """Return "yes", or what a piece of work was refused for; faults of the library are marked as such."""
    try:
        work()
    except CompressError as error:
        return str(error)
    except Exception as error:
        return f"FAULT {type(error).__name__}: {error}"
    return "yes"


class Trial:
    """Try one type in a folder."""

    def __init__(self, kind, place):
        self.kind, self.place, self.number = kind, place, 0
        self.text = place / "text.txt"
        self.text.write_text(TEXT)
        self.model = zoo.save(kind, place / "model")
        self.found = {}

    def run(self, *passes):
        self.number += 1
        calibration = {"text": str(self.text), "samples": 4, "length": 32}
        recipe = {"model": str(self.model), "calibration": calibration, "passes": list(passes)}
        return compress.run(recipe, self.place / f"out-{self.number}")

    def all(self):
        """Do all work; what is refused in a combination is tried by itself."""
        found = self.found
        found["quantise"] = attempt(lambda: self.run(QUANTISE))
        if found["quantise"] != "yes":
            return found
        self.loaded(self.place / "out-1")
        together = {"prune": PRUNE, "tune": TUNE, "prompt": PROMPT}
        said = attempt(lambda: self.run(PRUNE, {**QUANTISE, "keep_zeros": True}, TUNE, PROMPT))
        for name, step in together.items():
            steps = [step] if name == "prune" else [QUANTISE, step]
            found[name] = said if said == "yes" else attempt(lambda steps=steps: self.run(*steps))
        found["structured"] = attempt(lambda: self.run(STRUCTURED, LORA))
        found["lora"] = found["structured"] if found["structured"] == "yes" else attempt(lambda: self.run(LORA))
        if found["structured"] != "yes" and found["lora"] != "yes":
            found["structured"] = attempt(lambda: self.run(STRUCTURED))
        settings = compress.config.read_settings(self.place / "out-1")
        found["vllm"] = unserved(settings, self.kind) or "yes"
        return found

    def loaded(self, out):
        """Load a checkpoint; compare it with the run's own probe, and generate."""
        found, given = self.found, zoo.TOKENS[None]
        models = []
        found["load"] = attempt(lambda: models.append(compress.load(out, bits=3)))
        if not models:
            return
        probe = json.loads((out / "compression.json").read_text())["probe"]
        last = models[0](input_ids=torch.tensor([probe["tokens"]]), use_cache=False).logits[0, -1]
        gaps = [abs(last[token].item() - value) for token, value in probe["at_bits"]["3"]["top"]]
        if not max(gaps) <= 1e-3 * last.std().item():
            found["load"] = f"FAULT: its logits are {max(gaps)} from those of the run"
        wanted = {
            "max_new_tokens": 3,
            "min_new_tokens": 3,
            "do_sample": False,
            "attention_mask": torch.ones_like(given),
        }
        found["generate"] = attempt(lambda: models[0].generate(given, **wanted))
        if found["generate"] != "yes":  # is it transformers' own?
            stock = auto_class(read_config(self.model)).from_pretrained(self.model)
            own = attempt(lambda: stock.generate(given, **wanted))
            if own == found["generate"]:
                found["generate"] = f"transformers cannot: {own.removeprefix('FAULT ')}"


def try_out(kind, queue):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    started, place = time.process_time(), tempfile.TemporaryDirectory()
    try:
        trial = Trial(kind, Path(place.name))
    except Exception as error:
        queue.put({"type": kind, "built": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return
    with place:
        found = trial.all()
    queue.put({"type": kind, **found, "seconds": round(time.process_time() - started, 1)})


def every(kinds):
    """Yield what was found of each type."""
    context = multiprocessing.get_context("fork")
    for kind in kinds:
        queue = context.Queue()
        process = context.Process(target=try_out, args=(kind, queue))
        process.start()
        try:
            yield queue.get(timeout=SECONDS)
        except Exception:
            yield {"type": kind, "built": f"not finished in {SECONDS} seconds"}
            process.kill()
        process.join()


def known(page):
    """Return what the table of docs/models.md says works: type -> columns."""
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line.count("|") == len(COLUMNS) + 5]
    cells = {row[0].strip(): zip(COLUMNS, row[3:], strict=False) for row in rows}  # after type, packed, experts
    return {kind: {column for column, cell in found if cell.strip() == "yes"} for kind, found in cells.items()}


def main():
    before, results = known(Path(__file__).parent.parent / "docs" / "models.md"), []
    for found in every(sys.argv[1:] or zoo.kinds()):
        results.append(found)
        print(json.dumps(found), flush=True)
    made = [found for found in results if "built" not in found]
    works = [found for found in made if all(found.get(column) == "yes" for column in ("quantise", "load"))]
    faults = [f"{one['type']}: {value}" for one in made for value in one.values() if str(value).startswith("FAULT")]
    lost = [
        f"{found['type']}: {column}"
        for found in results
        for column in sorted(before.get(found["type"], ()))
        if found.get(column) != "yes"
    ]
    print(
        f"{len(works)} of {len(made)} types work, of {len(results)} that there are; faults: {len(faults)}; lost: {len(lost)}"
    )
    sys.exit("\n".join([*faults, *lost]) or 0)


if __name__ == "__main__":
    main()
