"""What vLLM knows of a compressed checkpoint: which of its layers are packed, and the bits to read them at.

vLLM pickles its configuration for its other processes, which import this module before they call any plugin: importing it registers the
method.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from compress.config import METHOD, StoredConfig, read_settings
from compress.errors import CompressError
from compress.loading import read_config
from compress.structure import architecture
from compress.vllm.layers import DRAFT, LinearMethod, Stored, TiedHead, VocabularyMethod
from compress.vllm.settings import Held, Settings, held_bits, legal_degrees, settings_of, unserved

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@register_quantization_config(METHOD)
class CompressQuantization(QuantizationConfig):
    """Choose how every layer of a checkpoint is served."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = StoredConfig(**record)
        self.folder, self.access = "", dict[str, Any]()
        self.given: dict[str, Any] = {}  # by --hf-overrides
        self.names: dict[str, str] = {}  # of packed modules in vLLM -> in the checkpoint
        self.shapes = self.config.shapes()  # by name in the checkpoint
        self.embedding = self.head = ""  # names in the checkpoint
        self.tied = False
        self.degrees: list[int] = []
        self.held: dict[str, Held] | None = None  # by name in the checkpoint; None until the first layer asks

    def get_name(self) -> Any:
        """Return what ``quant_method`` of a checkpoint says."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations that packed layers take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU that the kernels are made for, as 10 * major + minor."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: all is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressQuantization:
        """Hold ``quantization_config`` of a checkpoint."""
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the records of packed modules, and refuse what cannot be served, or not at the bits that are asked for."""
        self.folder, self.access = model_name, {"revision": revision} if revision else {}
        if not self.config.modules:  # --hf-overrides of quantization_config replaces all that the file says
            place = cached_file(model_name, "config.json", **self.access)
            self.config = read_settings(Path(str(place)).parent) or self.config
        structure = architecture(config := read_config(model_name, **self.access))
        reason = unserved(self.config, config.model_type)
        if reason is not None:
            raise CompressError(f"{model_name}: {reason}; serve it with --engine transformers.")
        self.embedding, self.head = structure.stored_name(structure.embedding), structure.stored_name(structure.head)
        self.shapes, self.tied = self.config.shapes(), bool(getattr(config, "tie_word_embeddings", False))
        self.names = {name: name for name in self.shapes}
        self.degrees = legal_degrees(config.to_dict(), self.shapes.values())
        start = "compress_"
        self.given = {key.removeprefix(start): value for key, value in vars(hf_config).items() if key.startswith(start)}
        held_bits(model_name, self.config, settings_of(self.given, "--hf-overrides.compress_"), self.access)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn what this model's class calls the modules of the checkpoint."""
        self.names = hf_to_vllm_mapper.apply_dict(self.names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose how a layer is served; None leaves it to vLLM."""
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        if self.held is None:
            self._begin(layer.tp_size, prefix)
        name = prefix.removeprefix(DRAFT).lstrip(".")
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(isinstance(layer, ParallelLMHead), name)
        stored = [self._stored(self.names.get(part, part)) for part in self._parts(name)]
        if not any(one.shape for one in stored):
            return UnquantizedLinearMethod()
        return LinearMethod(stored)

    def _begin(self, degree: int, prefix: str) -> None:
        """Choose the bits, now that all is known that may say them."""
        config = get_current_vllm_config_or_none()
        extra = dict((getattr(config, "additional_config", None) or {}).get("compress") or {})
        found = settings_of({**extra, **self.given}, "--additional-config compress.")
        speculative = getattr(config, "speculative_config", None)
        if prefix.startswith(DRAFT) or (speculative and config.model_config is speculative.draft_model_config):
            found = Settings(found.draft_bits, exact=found.exact)
        if degree not in self.degrees:
            legal = ", ".join(map(str, self.degrees))
            raise CompressError(f"{self.folder}: cannot be split over {degree} processes; legal degrees are {legal}.")
        graphs = getattr(getattr(config, "compilation_config", None), "cudagraph_mode", None)
        if found.held_bits is not None and torch.cuda.is_available() and graphs is not None and graphs.name != "NONE":
            raise CompressError(
                "held_bits: a CUDA graph holds one number of bits, so a change would do nothing; add --enforce-eager."
            )
        self.held = held_bits(self.folder, self.config, found, self.access)

    def _parts(self, name: str) -> list[str]:
        """Return the names, in vLLM, of the matrices that a layer keeps as one."""
        path, dot, last = name.rpartition(".")
        parts = self.packed_modules_mapping.get(last) or _FUSED.get(last) or [last]
        return [path + dot + part for part in parts]

    def _stored(self, name: str) -> Stored:
        """Find what there is of a matrix, by its name in the checkpoint."""
        return Stored(self.folder, name, self.shapes.get(name), (self.held or {}).get(name, Held(0, 0, 0)))

    def _vocabulary(self, is_head: bool, name: str) -> QuantizeMethodBase:
        """Choose how an embedding or a head is served; some models do not say what theirs is called."""
        found = self._stored(self.names.get(name, self.head if is_head else self.embedding))
        if found.shape is not None:
            return VocabularyMethod(found)
        tied = is_head and self.tied and self.embedding in self.shapes
        return TiedHead() if tied else UnquantizedEmbeddingMethod()
