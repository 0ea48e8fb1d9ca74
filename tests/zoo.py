"""Tiny random models of every type that transformers has: default configs, shrunk by one rule for all.

python -m tests.zoo            # which types the rule makes a model of, and why not the others
"""

import re
import sys
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.conftest import save_tokenizer

TOKENS = torch.arange(5, 29)
VOCABULARY = 512
RULES = (  # the first that matches a key of a config says its number, where it has one that is not 0 or -1
    (r"zero_expert_num|.*_layers_per_.*|hc_.*count|hc_mult|heads_per_ngram", 2),
    (r"first_k_dense_replace|num_dense_layers|num_nextn.*|(moe_)?(n|num)_shared_experts|patch_.*per.*", 1),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|topk_group|top_k_experts|n_group|num_expert_group|o_groups", 2),
    (r".*n_groups|mamba_n_?groups|index_n_heads|num_codebooks|n_mamba_heads|indexer_n_heads", 2),
    (r".*(key_value|kv)_heads|kv_n_heads|linear_num_key_heads", 2),
    (r"mamba_num_heads|.*rope_head_dim|rotary_dim|d_rel|(.*_)?(sliding_)?window(_size)?|.*local_attention", 8),
    (r"attention_chunk_size|attention_window_size|keep_window_size|index_topk|indexer_budget", 8),
    (r"index_block_size|index_kpool|indexer_compress_ratio", 4),
    (r".*(num|n|encoder|decoder|attention)_(attention_)?heads?|num_query_groups|num_attention_groups|.*num_value_heads", 4),
    (r"(.*_)?n?(um)?_?(routed_|local_)?experts", 4),
    (r".*vocab(_size.*)?|ngram_vocab_size_base", VOCABULARY),
    (r".*position_embeddings|n_positions|n_ctx|max_seq_len|context_length|.*_positions|rel_extent|.*_max_distance", 256),
    (r".*lora_rank|(shared_)?(moe|expert|experts)_.*(size|dim)|.*shared_experts?_inter.*|time_step_rank|mamba_dt_rank", 32),
    (r"mamba_headdim|mamba_d_head|num_centroids|expert_.*(size|dim)|ple_embed_dim|(shape|pronunciation)_embed_dim", 32),
    (r".*_rank|.*head_dim|d_head|d_kv|kv_channels|attention_head_size|.*_d_state|.*state_size|chunk_size|.*_chunk_size", 16),
    (r"hidden_size_per_layer_input|head_size|dim_head|mamba_head_dim", 16),
    (r"image_size", 56),
    (r"patch_size", 14),
    (r"depth", 2),
    (r".*intermediate_size.*|.*ffn_dim|dff|dim_ff|.*ffn_hidden_size|d_inner|n_inner|d_ff|feed_forward_size|mamba_d_ssm", 128),
    (r"router_hidden_size|mlp_dim", 128),
    (r".*hidden_size|d_model|n_embd?|embed_dim|emb(edding)?_dim|.*embedding_size|lru_width|word_embed_proj_dim|conv_dim|codebook_dim", 64),
)  # fmt: skip
LAYERS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_blocks|num_decoder_layers|num_layers_per_stack"
IDS = {"bos": 0, "eos": 0, "pad": 0, "sep": 0, "cls": 0, "unk": 0, "dec": 0, "for": 0, "eod": 0}
PLAIN = ("id2label", "label2id", "rope_parameters", "rope_scaling", "per_layer_config", "transformers_version")


def kinds() -> list[str]:
    """Return every type of a causal language model, or one of images and text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def class_name(kind):
    """Return the class that checkpoints of a type are of: where there is one of images and text, that."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return name if isinstance(name, str) else name[0]


def shrunk(config):
    """Return a config's values, made small; lists with an item for every layer keep one of each kind."""
    if not all(isinstance(key, str) for key in config):
        return config
    depths = [value for key, value in config.items() if re.fullmatch(LAYERS, key) and isinstance(value, int)]
    depth = max(depths, default=0)
    lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == depth > 2}
    kept = sorted({values.index(value) for values in lists.values() for value in values})[:6]
    kept = sorted({*kept, *[place for place in range(depth) if place not in kept][: max(0, 2 - len(kept))]})
    found = {key: _small(key, value, kept, depth) for key, value in config.items()}
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and found.get("qk_rope_head_dim"):
        rope["mrope_section"] = [2, 1, 1]
    if isinstance(config.get("per_layer_config"), dict):
        own = {int(layer): value for layer, value in config["per_layer_config"].items()}
        found["per_layer_config"] = {new: shrunk(own[old]) for new, old in enumerate(kept) if old in own}
    heads = found.get("num_attention_heads")
    if "num_key_value_heads" in found and config["num_key_value_heads"] in (None, config.get("num_attention_heads")):
        found["num_key_value_heads"] = heads
    if "head_dim" in found and found["head_dim"] is None:
        found["head_dim"] = 16
    if found.get("qk_rope_head_dim") and config.get("head_dim") == config["qk_rope_head_dim"]:
        found["head_dim"] = found["qk_rope_head_dim"]
    if found.get("qk_head_dim") and found.get("qk_nope_head_dim"):
        found["qk_head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    return found


def _small(key, value, kept, depth):
    if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return IDS.get(key[:3], min(value, VOCABULARY - 1 - sum(map(ord, key)) % 10))
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return _small_rope(value)
    if isinstance(value, dict) and key not in PLAIN:
        return shrunk(value)
    if isinstance(value, list) and len(value) == depth > 2:
        return [_small(key, value[place], kept, 0) for place in kept]
    if not isinstance(value, int | float) or isinstance(value, bool) or value in (0, -1):
        return value
    if re.fullmatch(LAYERS, key):
        return len(kept) if value == depth else min(value, 2)
    return next((number for rule, number in RULES if re.fullmatch(rule, key)), value)


def _small_rope(rope):
    found = {key: _small_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    if "mrope_section" in found:
        found["mrope_section"] = [4, 2, 2]
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = 256
    return found


_PAIR = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = {"rope_parameters.mrope_section": [4, 2, 2]}
_HYBRID = {
    "num_hidden_layers": 5, "attention_hidden_size": 128, "attention_head_dim": 32,
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
}  # fmt: skip
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
PATCHES = {  # what the rule gets wrong, or has no default for; of a type, or of a part of one
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_thinker_text", "qwen2_5_omni_text", "glm4v_text", "glm46v_text",
         "glm_ocr_text", "paddleocr_vl_text", "paddleocr_text", "glmga_text"), _SECTIONS,
    ),
    "glm4v_moe_text": {"rope_parameters.mrope_section": [2, 1, 1]},
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [3, 3, 2], "moe_intermediate_size": [32, 32]},
    **{key: {"rope_parameters": dict.fromkeys(_PAIR, _ROPE)} for key in ("cohere_compass", "cohere_compass_text")},
    **{key: {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4} for key in ("qwen4_exp", "qwen4_exp_text")},
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLUTIONS),
    "dots3_note_text": {"head_dim": 24, "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2}}},
    "chameleon": {"vocabulary_map": {"<image>": 500}},
    "emu3": {"vocabulary_map": {"<image>": 500}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0, "ffn_config.hidden_size": 64},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_routed_experts": 4},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6, "ngpt_alpha_init": 0.2,
             "layer_types": ["sliding_attention", "mlp", "sliding_attention", "mlp", "full_attention", "mlp"]},
    "blt": {"encoder_config.hidden_size_global": 64, "decoder_config.hidden_size_global": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 128, "layer_types": _PAIR,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "granite4_vision": {"vision_feature_layer": [1], "deepstack_layer_map": [[0, 0]]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "step3p5": {"sliding_window": 8},
    "step3p7_text": {"sliding_window": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_HYBRID, "mamba_dt_rank": 4},
    "zamba2": {**_HYBRID, "n_mamba_heads": 4, "mamba_headdim": 32, "num_query_groups": 4, "kv_channels": 16, "hybrid_layer_ids": [2, 4]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind, **changes):
    """Return a small config of a type, with changes to its values."""
    made = transformers.CONFIG_MAPPING[kind]
    try:
        values = made().to_dict()
    except Exception:  # some types have no defaults for all
        values = {}
    for key in ("id2label", "label2id", "transformers_version", "_name_or_path", "architectures", "dtype"):
        values.pop(key, None)
    found = shrunk(values)
    for part in (found, *(value for value in found.values() if isinstance(value, dict))):
        patch(part, PATCHES.get(part.get("model_type") or kind, {}))
    patch(found, {**PATCHES.get(kind, {}), **changes})
    found.pop("model_type", None)
    return made(**found)


def patch(config, changes):
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if rest:
            config[first] = config.get(first) or {}
            patch(config[first], {rest: value})
        else:
            config[first] = value


def build(kind, **changes):
    """Return a tiny model whose weights are larger than usual, so that every block matters."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name(kind))._from_config(tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                small = parameter.ndim < 2 or "A_log" in name or "conv" in name
                parameter.add_(0.05 * torch.randn_like(parameter)) if small else parameter.normal_(
                    0, parameter.shape[-1] ** -0.5
                )
    model.tie_weights()
    return model


def save(kind, folder: Path, **changes):
    """Write a tiny model as its family's checkpoints are, with a tokenizer."""
    build(kind, **changes).save_pretrained(folder, save_original_format=True)
    save_tokenizer(folder)
    return folder


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    for kind in sys.argv[1:] or kinds():
        try:
            model = build(kind)
            size = sum(p.numel() for p in model.parameters())
            said = model(input_ids=TOKENS[None], use_cache=False).logits
            print(kind, f"{size / 1e6:.2f} M", "ok" if said.isfinite().all() else "NOT FINITE", flush=True)
        except Exception as error:
            print(kind, "FAILED", type(error).__name__, " ".join(str(error).split())[:200], flush=True)
