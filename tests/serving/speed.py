"""Time vLLM's engine with a dense model and with a checkpoint of it: ``.venv-serve/bin/python tests/serving/speed.py DENSE PACKED [--bits 4,3]``.

Each engine is a process of its own, and they take turns. Prints the median over rounds of tokens per second of processor time of the
whole engine, at one request and at several at once, and the ratios to the dense one within a round. Run it with the variables of
``environment.py``; ``OMP_NUM_THREADS`` says how many threads there are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import ENVIRONMENT

REQUESTS = (1, 8)


def timed(model: str, overrides: str, tokens: int, rounds: int) -> None:
    """Wait for a line on the standard input before each round, and answer with its speeds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype="bfloat16", max_model_len=512, disable_log_stats=True, hf_overrides=json.loads(overrides),
        enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(100 + 7 * place, 132 + 7 * place))} for place in range(max(REQUESTS))]
    for _ in range(rounds + 1):  # the first is not counted
        input()
        found = []
        for count in REQUESTS:
            begun = time.process_time()
            llm.generate(prompts[:count], sampling, use_tqdm=False)
            found.append(count * tokens / (time.process_time() - begun))
        print("speeds", json.dumps(found), flush=True)


def main() -> None:
    """Start the engines, let them take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense")
    parser.add_argument("packed")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    wanted = {"dense": (given.dense, {})}
    for bits in given.bits.split(","):
        wanted[f"{bits} bits"] = given.packed, {"compress_bits": int(bits)}
        wanted[f"{bits} bits, --fast"] = given.packed, {"compress_bits": int(bits), "compress_exact": False}
    engines = {}
    for name, (model, overrides) in wanted.items():
        command = [
            sys.executable,
            __file__,
            "--one",
            model,
            json.dumps(overrides),
            str(given.tokens),
            str(given.rounds),
        ]
        inner = {**ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        engines[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inner)
    rows = {name: [] for name in engines}
    for _ in range(given.rounds + 1):
        for name, engine in engines.items():
            engine.stdin.write("\n")
            engine.stdin.flush()
            rows[name].append(json.loads(next(line for line in engine.stdout if line.startswith("speeds"))[6:]))
    for name, found in rows.items():
        pairs = list(zip(found[1:], rows["dense"][1:], strict=True))
        cells = [
            f"{count} at once {statistics.median(own[place] for own, _ in pairs):.1f} tokens/s, "
            f"{statistics.median(own[place] / dense[place] for own, dense in pairs):.2f} of dense"
            for place, count in enumerate(REQUESTS)
        ]
        print(f"{name}: {'; '.join(cells)}")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        timed(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
