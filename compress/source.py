"""Open the model that work starts from, and tell passes what they may know of it before any weight is read."""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from compress.config import read_settings
from compress.dequantised import Dequantised, dense_files
from compress.errors import CompressError, first_line
from compress.gguf_files import open_gguf, write_beside
from compress.hub import located, model_folder
from compress.loading import load_tokenizer, read_config
from compress.models import auto_class, stated, text_config
from compress.passes import Context
from compress.quant.records import unstacked
from compress.ranks import Ranks, processes
from compress.sidecars import PEFT_CONFIG
from compress.streaming import State, StreamedModel, open_state
from compress.structure import architecture, block_of
from compress.weights import Checkpoint
from compress.workspace import digest

# Of the largest logit. What transformers dequantises on loading in float32 is not rounded to the dtype of the config first.
_TOLERANCE, _OF_QUANTISED = 1e-3, 2e-2
_FLOAT, _READ_WHOLE = 4, 8  # bytes per number; of a GGUF file float32 in numpy, then in torch


@dataclass(frozen=True)
class Source:
    """Hold the dense model a recipe starts from; ``folder`` is the path of a GGUF file where it is one."""

    folder: Path
    state: State
    tokenizer: PreTrainedTokenizerBase
    sha256: dict[str, str]
    quantised: bool = False  # as stored
    uneven: str | None = None  # a matrix that transformers does not dequantise rightly (findings/fp8_last_block.sh)

    def unchecked(self) -> str | None:
        """Return why what is read is not compared with transformers' own model; None where it is."""
        if self.uneven is not None:
            return f"which reads another {self.uneven} out of blocks of unequal size"
        whole = _READ_WHOLE * sum(math.prod(item.shape) for item in self.state.source.info().values())
        if self.folder.is_file() and whole > (free := psutil.virtual_memory().available):
            return f"which reads GGUF files whole, into {whole / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return None

    def write_beside(self, target: Path) -> None:
        """Write what a GGUF file has within and a folder beside it; of a folder all is there to be copied."""
        if self.folder.is_file():
            write_beside(target, self.state.config, self.tokenizer)


def open_source(model: str | Mapping[str, Any]) -> Source:
    """Open a dense model, as a recipe names it: a folder, the built-in one, or a hub id."""
    folder = model_folder(model)
    if folder.is_file():
        config, tokenizer, gguf = open_gguf(folder)
        sha256 = gguf.sha256()
        return Source(folder, open_state(gguf, config, digest(sha256)), tokenizer, sha256)
    config = read_config(folder)
    if (folder / PEFT_CONFIG).exists():
        raise CompressError(
            f"{folder}: has a peft adapter beside its weights ({PEFT_CONFIG}), which transformers would put on the model; "
            "merge it into the model, or move it to a folder of its own."
        )
    auto_class(config)
    tokenizer = load_tokenizer(folder)
    files = dense_files(Checkpoint(folder), config)
    sha256 = files.sha256()
    state = open_state(files, config, digest(sha256))
    quantised = isinstance(files, Dequantised)
    return Source(folder, state, tokenizer, sha256, quantised, files.uneven if isinstance(files, Dequantised) else None)


def checkpoint_state(folder: Path) -> State:
    """Open a checkpoint, or a dense model, as passes see it: nothing is read but headers."""
    settings, config = read_settings(folder), read_config(folder)
    if settings is not None:
        del config.quantization_config  # the model is built dense and then replaced
    structure = architecture(config)
    running = {structure.stored_name(structure.head): structure.head}
    matrices = unstacked(settings.shapes()) if settings else {}
    packed = {running.get(name, name): shape for name, shape in matrices.items()}
    shapes = settings.block_shapes() if settings else {}
    return open_state(Checkpoint(folder), config, digest(str(folder)), packed, shapes)


def _logits_of_whole(source: Source, tokens: Tensor, places: Any) -> Tensor:
    """Compute what transformers' own model makes of a few tokens, int64 [T]: float32 [T, vocabulary]; ``places`` is its device map."""
    place, given = located(source.folder, {})
    if given and hasattr(transformers, "GgufConfig"):
        given["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _told_nothing("accelerate.big_modeling"), tempfile.TemporaryDirectory() as scratch:
        whole = auto_class(source.state.config).from_pretrained(
            place, dtype=torch.float32, device_map=places, offload_folder=scratch, **given
        )
        logits: Tensor = whole(input_ids=tokens[None], use_cache=_needs_cache(source)).logits[0].float()
    remove_hook_from_submodules(whole)
    for module in whole.modules():
        vars(module).pop("forward", None)  # bound to the module, which so holds itself: embedding and head would stay
    return logits


def _needs_cache(source: Source) -> bool:
    """Tell whether layers have others' keys and values, which before transformers 5.6 they have where there is a cache alone."""
    shares = stated(text_config(source.state.config), "num_kv_shared_layers")
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return bool(shares) and release < (5, 6)


@torch.no_grad()
def check_source(source: Source, tokens: Tensor) -> None:
    """Refuse a model of which one block after the other computes other logits than the whole as transformers loads it.

    ``tokens``, int64 [T], are a few. transformers leaves the blocks on disk and reads a module when it is called, so neither has
    more than a block and what lies outside the blocks in memory.
    """
    model = StreamedModel(source.state, torch.device("cpu"))
    streamed, blocks = model.run_all(tokens), model.structure.blocks
    outside = [name.rpartition(".")[0] for name in model.model.state_dict() if block_of(name, model.structure) is None]
    places = {**dict.fromkeys(outside, "cpu"), blocks: "disk"} if source.folder.is_dir() else "cpu"
    del model  # never both
    try:
        try:
            wanted = _logits_of_whole(source, tokens, places)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if "meta" not in str(error):
                raise
            wanted = _logits_of_whole(source, tokens, "cpu")  # parameters read by others than the module that has them
    except Exception as error:  # whatever a model's class may raise
        raise CompressError(f"{source.folder}: transformers cannot run it ({first_line(error)}).") from error
    if not streamed.isfinite().all() and not wanted.isfinite().all():
        return  # the same to both; which weight it is, passes and writer tell
    most = _OF_QUANTISED if source.quantised else _TOLERANCE
    apart, largest = _apart(streamed, wanted)
    room = _FLOAT * sum(math.prod(item.shape) for item in source.state.source.info().values())
    if not apart <= most * largest and places != "cpu" and room < psutil.virtual_memory().available:
        # accelerate reads parameters that other modules use than those that have them from wherever the memory pointed to
        apart, largest = _apart(streamed, _logits_of_whole(source, tokens, "cpu"))
    if not apart <= most * largest:
        advice = "load it with transformers and save_pretrained it once."
        if _needs_cache(source):
            advice = "before transformers 5.6 its layers share keys and values only where there is a cache: install a newer one."
        raise CompressError(
            f"{source.folder}: read block by block it computes other logits (by up to {apart:.3g}, the largest being "
            f"{largest:.3g}) than transformers' from_pretrained of it, so another model would be compressed; {advice}"
        )


def _apart(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return the largest difference of logits, and the largest of those wanted."""
    return float((found - wanted).abs().max()), float(wanted.abs().max())


@contextmanager
def _told_nothing(logger: str) -> Iterator[None]:
    """Keep a library's logger from speaking, for the length of a ``with``, of what is meant."""

    def silent(record: logging.LogRecord) -> bool:
        return False

    logging.getLogger(logger).addFilter(silent)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(silent)


def pick_device(name: str) -> torch.device:
    """Return the device of a recipe, if it is there; ``auto`` gives each process on a machine a GPU of its own."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
        if name == "auto" and device.type == "cuda" and (team := processes(device)).num_processes > 1:
            device = team.device
    except (RuntimeError, AssertionError) as error:
        raise CompressError(f"device {name!r} cannot be used here: {first_line(error)}.") from error
    return device


def make_context(source: Source, device: torch.device, seed: int, state: State | None = None) -> Context:
    """Tell what passes may know of a state of the model (the source's by default) before any weight is read."""
    state = state or source.state
    model = StreamedModel(state, torch.device("meta"))
    inside = {name: linear for i in range(len(model.blocks)) for name, linear in model.linears(i).items()}
    tied = f"{model.head}.weight" in model.model.all_tied_weights_keys
    sizes = {name: math.prod(item.shape) for name, item in state.source.info().items()}
    if tied:
        sizes.pop(f"{model.head}.weight", None)
    return Context(
        structure=model.structure,
        device=device,
        seed=seed,
        linears={name: linear.shape for name, linear in inside.items()},
        outside={name: linear.shape for name, linear in model.outside().items()},
        head=model.head,
        tied=tied,
        vocabulary=int(model.model.get_submodule(model.structure.embedding).num_embeddings),  # type: ignore[arg-type]
        config=state.config,
        shapes=state.shapes,
        biased=frozenset(n for n, linear in inside.items() if getattr(linear.module, "bias", None) is not None),
        parameters=sum(sizes.values()),
        context_length=_limit(text_config(state.config)),
        tokenizer=source.tokenizer,
        ranks=Ranks.at_work(device),
    )


def _limit(config: PretrainedConfig) -> int | None:
    """Return the tokens that a model can look at; None without a limit, which some configs write as -1."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
