"""Products with packed weights on a CPU beside torch's own: ``python -m compress.evals.bench_cpu``.

Four parts, each with all its candidates in turn in every round of one run, so that a busy machine is busy for all of them;
figures are medians over the rounds with the quartiles. The weights of one candidate are long out of the cache when
its turn comes again. `layers`: one row of activations; torch in float32 and bfloat16, torch's uniform 4-bit product
(``aten::_weight_int4pack_mm_for_cpu``, groups of 128), and the C library by instruction set, mode and width, with the
memory's speed in the same rounds. `rows`: several rows of activations. `decode`: tokens per second of a random Llama of
1.2 billion weights, head packed too. `demo`: ``generate`` on the built-in model.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig

import compress
from compress.hf import packed_modules, replace_packed
from compress.kernels import cpu
from compress.quant.format import PackedShape
from compress.streaming import empty_model

SHAPES = {"4096 x 4096": (4096, 4096), "14336 x 4096": (14336, 4096)}
DEMO_SHAPES = {"192 x 192": (192, 192), "500 x 192": (500, 192), "192 x 500": (192, 500)}
Times = dict[str, list[float]]


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    repeat: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> Times:
    """Seconds per call of every candidate in every round, after one round that is not counted.

    What is to be done `before` a candidate's turn is not counted either. On one thread they are seconds of processor time: what other processes take meanwhile does not count.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: Times = {name: [] for name in candidates}
    for counted in range(-1, rounds):
        for name, call in candidates.items():
            if before and name in before:
                before[name]()
            begun = clock()
            for _ in range(repeat):
                call()
            if counted >= 0:
                times[name].append((clock() - begun) / repeat)
    return times


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def ratios(times: Times, name: str, base: str) -> float:
    """How much faster than another: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(times[name], times[base], strict=True))


def random_layer(bits: int, rows: int, columns: int) -> tuple[list[Tensor], Tensor]:
    """Random planes and a float16 codebook."""
    planes = torch.randint(-(2**31), 2**31 - 1, (bits, rows, -(-columns // 32)), dtype=torch.int32)
    return list(planes.unbind(0)), torch.randn(rows, 2**bits).half()


def torch_products(x: Tensor, rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """What torch offers for the same layer."""
    full, half, activations = torch.randn(rows, columns), torch.randn(rows, columns).bfloat16(), x.bfloat16()
    found: dict[str, Callable[[], object]] = {
        "torch float32": lambda: nn.functional.linear(x, full),
        "torch bfloat16": lambda: nn.functional.linear(activations, half),
    }
    if columns % 128 == 0 and rows % 64 == 0:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.randn(columns // 128, rows, 2).bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        found["aten int4pack"] = lambda: product(activations, packed, 128, scales)
    return found


def our_products(x: Tensor, rows: int, columns: int, isas: list[int], widths: list[int]) -> dict[str, Any]:
    """The C library's, by instruction set, mode and width; the same planes for all of one width."""
    found: dict[str, Any] = {}
    for bits in widths:
        planes, codebook = random_layer(bits, rows, columns)
        for isa in isas:
            for int8 in (False, True):
                name = f"{cpu.ISAS[isa]} {'int8' if int8 else 'exact'} {bits}"
                found[name] = partial(cpu.Prepared(planes, codebook, columns, int8, isa), x)
    return found


def layers(arguments: argparse.Namespace, console: Console) -> None:
    """One row of activations."""
    found = cpu.library()
    isas = [found.isa, *({1} & set(range(found.isa)))] if isinstance(found, cpu.Library) else []
    memory = torch.randint(0, 9, (1 << 24,))  # 128 MiB
    for shape, (rows, columns) in {**SHAPES, **DEMO_SHAPES}.items():
        x, small = torch.randn(1, columns), shape in DEMO_SHAPES
        candidates = torch_products(x, rows, columns) | our_products(x, rows, columns, isas, arguments.widths)
        if not small:
            candidates["memory read"] = memory.sum
        times = take_turns(candidates, arguments.rounds, repeat=50 if small else 1)
        read = memory.nbytes / statistics.median(times.pop("memory read")) / 1e9 if not small else 0.0
        table = Table("what", "µs", "Gweights/s", "GB/s", "of memory", "x float32", "x int4pack")
        for name, seconds in times.items():
            rate = rows * columns / statistics.median(seconds) / 1e9
            bits = {"torch float32": 32, "torch bfloat16": 16, "aten int4pack": 4}.get(name) or int(name[-1])
            table.add_row(
                name, spread([1e6 * value for value in seconds]), f"{rate:.1f}", f"{rate * bits / 8:.1f}",
                f"{rate * bits / 8 / read:.0%}" if read else "", f"{ratios(times, name, 'torch float32'):.2f}",
                f"{ratios(times, name, 'aten int4pack'):.2f}" if "aten int4pack" in times else "",
            )  # fmt: skip
        console.print(
            f"{shape}, {torch.get_num_threads()} thread(s)" + (f", memory read {read:.1f} GB/s" if read else "")
        )
        console.print(table)


def several_rows(arguments: argparse.Namespace, console: Console) -> None:
    """Two to a hundred rows of activations at 4 bits."""
    rows, columns = SHAPES["4096 x 4096"]
    table = Table("rows", "exact, ms", "int8, ms", "x float32, exact", "x float32, int8")
    planes, codebook = random_layer(4, rows, columns)
    weight = torch.randn(rows, columns)
    for batch in (1, 2, 4, 8, 16, 17, 32, 128):
        x = torch.randn(batch, columns)
        exact, int8 = (cpu.Prepared(planes, codebook, columns, mode) for mode in (False, True))
        times = take_turns(
            {
                "torch": partial(nn.functional.linear, x, weight),
                "exact": partial(exact, x),
                "int8": partial(int8, x),
            },
            arguments.rounds,
        )
        milliseconds = [spread([1e3 * value for value in times[name]]) for name in ("exact", "int8")]
        table.add_row(str(batch), *milliseconds, *(f"{ratios(times, name, 'torch'):.2f}" for name in ("exact", "int8")))
    console.print(f"4096 x 4096 at 4 bits, {torch.get_num_threads()} thread(s)")
    console.print(table)


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def random_llama(blocks: int, dtype: torch.dtype, packed: tuple[int, int] | None) -> Any:
    """A Llama with the shapes of Llama-3.2-1B and random weights; linears and head in planes from seed to parent."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=blocks, head_dim=64,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = empty_model(config)
    if packed:
        linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        shapes = {name: PackedShape(layer.out_features, layer.in_features, *packed) for name, layer in linears.items()}
        replace_packed(model, shapes)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(0.02 * torch.randn(value.shape, dtype=dtype), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and buffer.is_floating_point():
                module._buffers[name] = 0.02 * torch.randn(buffer.shape, dtype=buffer.dtype)
            elif buffer.is_meta:
                module._buffers[name] = torch.randint(-(2**31), 2**31 - 1, buffer.shape, dtype=buffer.dtype)
    return model.train(False)


def decoder(model: Any) -> Callable[[], None]:
    """One token after another, with a cache that grows."""
    state: dict[str, Any] = {"cache": None, "token": torch.zeros(1, 1, dtype=torch.long)}

    def step() -> None:
        with torch.inference_mode():
            output = model(input_ids=state["token"], past_key_values=state["cache"], use_cache=True)
            state.update(cache=output.past_key_values, token=output.logits[:, -1:].argmax(-1))

    return step


def decode(arguments: argparse.Namespace, console: Console) -> None:
    """Tokens per second of a model with a billion weights."""
    before = resident()
    lean = random_llama(arguments.blocks, torch.bfloat16, (2, 4))
    decoder(lean)()
    held = sum(tensor.nbytes for tensor in [*lean.buffers(), *lean.parameters()])
    console.print(
        f"loaded at 4 bits: {held / 1e9:.2f} GB of tensors, {(resident() - before) / 1e9:.2f} GB resident after a token"
    )
    del lean
    models = {
        f"torch {name}": random_llama(arguments.blocks, getattr(torch, name), None) for name in ("float32", "bfloat16")
    }
    steps = {name: decoder(model) for name, model in models.items()}
    packed = random_llama(arguments.blocks, torch.bfloat16, (2, 8))

    step = decoder(packed)

    def at(bits: int, exact: bool) -> None:
        for module in packed_modules(packed).values():
            module.bits, module.exact = bits, exact
        step()  # makes what is made once per width

    switches = {}
    for bits in (2, 3, 4, 8):
        for exact in (True, False):
            name = f"{bits} bits, {'exact' if exact else 'int8'}"
            switches[name], steps[name] = partial(at, bits, exact), step
    times = take_turns(steps, arguments.tokens, repeat=3, before=switches)
    table = Table("what", "tokens/s", "x bfloat16", "x float32")
    for name, seconds in times.items():
        versus = (f"{ratios(times, name, f'torch {base}'):.2f}" for base in ("bfloat16", "float32"))
        table.add_row(name, spread([1 / value for value in seconds]), *versus)
    console.print(f"{arguments.blocks} blocks, {torch.get_num_threads()} thread(s)")
    console.print(table)


def demo(arguments: argparse.Namespace, console: Console) -> None:
    """``generate`` on the built-in model, dense and at widths."""
    from compress.pipeline import model_folder

    tokens = torch.tensor([[5, 17, 40]])
    with tempfile.TemporaryDirectory() as name:
        folder = compress.run({"model": "builtin", "passes": [{"kind": "rtn", "bits": 4}]}, Path(name) / "model")
        models = {
            "dense float32": compress.load(model_folder("builtin"), dtype=torch.float32),
            "4 bits, dense kept": compress.load(folder, keep_dense=True, dtype=torch.float32),
            "4 bits, exact": compress.load(folder, dtype=torch.float32),
            "4 bits, int8": compress.load(folder, exact=False, dtype=torch.float32),
        }
        settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}

        def generate(model: Any) -> Callable[[], object]:
            return lambda: model.generate(tokens, use_cache=True, **settings)

        times = take_turns({name: generate(model) for name, model in models.items()}, arguments.rounds)
    table = Table("what", "tokens/s", "x dense")
    for name, seconds in times.items():
        table.add_row(name, spread([64 / value for value in seconds]), f"{ratios(times, name, 'dense float32'):.2f}")
    console.print(f"generate on the built-in model, {torch.get_num_threads()} thread(s)")
    console.print(table)


def main() -> None:
    """Run the parts asked for."""
    parts = {"layers": layers, "rows": several_rows, "decode": decode, "demo": demo}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=9, help="rounds of `decode`")
    parser.add_argument("--blocks", type=int, default=16, help="of the model in `decode`")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=120)
    console.print(compress.backend())
    for part in arguments.parts:
        parts[part](arguments, console)


if __name__ == "__main__":
    main()
