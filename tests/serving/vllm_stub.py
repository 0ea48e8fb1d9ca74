"""What the plugin uses of vLLM, with the signatures of 0.28 to 0.32 and nothing behind them."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

from torch import nn

CURRENT = SimpleNamespace(config=None)
REGISTERED = {}


class QuantizationConfig:
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {}


class QuantizeMethodBase:
    def tie_weights(self, layer, embed_tokens):
        layer.weight = embed_tokens.weight
        return layer


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class UnquantizedEmbeddingMethod(QuantizeMethodBase):
    pass


class LinearBase(nn.Module):
    """Asks for its method and lets it make the weights, as the linear layers of vLLM do."""

    def __init__(self, quant_config, prefix, in_features, out_features, dtype, rank=0, degree=1, split="out"):
        super().__init__()
        self.tp_rank, self.tp_size, self.prefix, self.params_dtype = rank, degree, prefix, dtype
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.output_sizes = out_features
        rows = degree if split == "out" else 1
        self.quant_method.create_weights(
            self,
            input_size_per_partition=in_features // (degree if split == "in" else 1),
            output_partition_sizes=[size // rows for size in out_features],
            input_size=in_features,
            output_size=sum(out_features),
            params_dtype=dtype,
            weight_loader=None,
        )


class QKVParallelLinear(LinearBase):
    num_kv_head_replicas = 1


class VocabParallelEmbedding(nn.Module):
    def __init__(self, quant_config, prefix, rows, columns, dtype, rank=0, degree=1):
        super().__init__()
        padded = -(-rows // 64) * 64 // degree
        first = min(rank * padded, rows)
        last = min((rank + 1) * padded, rows)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last)
        self.tp_size, self.prefix, self.params_dtype, self.embedding_dim = degree, prefix, dtype, columns
        self.num_embeddings_per_partition = padded
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            self, columns, [padded], columns, padded * degree, params_dtype=dtype, weight_loader=None
        )


class ParallelLMHead(VocabParallelEmbedding):
    pass


def register_quantization_config(name):
    def register(cls):
        assert name not in REGISTERED, "vLLM warns of a second registration"
        REGISTERED[name] = cls
        return cls

    return register


def vllm_config(**changes):
    """What is set while a model is built."""
    compilation = SimpleNamespace(static_forward_context={})
    fields = {"additional_config": {}, "speculative_config": None, "model_config": object()}
    return SimpleNamespace(compilation_config=compilation, **{**fields, **changes})


@contextmanager
def current(config):
    CURRENT.config = config
    try:
        yield config
    finally:
        CURRENT.config = None


def _current():
    assert CURRENT.config is not None
    return CURRENT.config


MODULES = {
    "vllm": {},
    "vllm.config": {
        "get_current_vllm_config": _current,
        "get_current_vllm_config_or_none": lambda: CURRENT.config,
    },
    "vllm.forward_context": {
        "get_forward_context": lambda: SimpleNamespace(
            no_compile_layers=CURRENT.config.compilation_config.static_forward_context
        )
    },
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
    },
    "vllm.model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
    "vllm.model_executor.layers.quantization.base_config": {
        "QuantizationConfig": QuantizationConfig,
        "QuantizeMethodBase": QuantizeMethodBase,
    },
    "vllm.model_executor.layers.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "UnquantizedEmbeddingMethod": UnquantizedEmbeddingMethod,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
}


def install():
    """Put the modules where an import finds them."""
    for name, content in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[])
        sys.modules[name] = module


def remove():
    """Take them away again, and what was imported with them."""
    for name in [*MODULES, "compress.vllm.config", "compress.vllm.layers"]:
        sys.modules.pop(name, None)
