"""Tiny configs of any transformers class: every size becomes small, all dropout is off, special ids fit the vocabulary.

The rules match the names of config fields; `table.py` has the exceptions.
"""

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

from .table import CONFIGS

VOCAB = 97
CLASSES = 5
WIDTH = 32

# Pattern of a full field name -> small value; the first match is used. A list or tuple is mapped element by element.
SIZES: list[tuple[str, Any]] = [
    (r"type_vocab_size|token_type_vocab_size|language_vocab_size", lambda n: min(n, 4)),
    (r".*codebook_size|.*codebook_vocab_size", lambda n: min(n, 32)),
    (r".*vocab_size|vocab_size_.*|embeddings_size", lambda n: VOCAB),
    (r"num_key_value_heads|.*_num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num", lambda n: min(n, 1)),
    (r"num_global_key_value_heads|.*key_value_heads", lambda n: min(n, 1)),
    (
        r"linear_num_.*_heads|index_n_heads|mamba_n_heads|mamba_num_heads|.*attention_heads|num_heads|n_heads?|.*_n_heads?"
        r"|.*_num_heads|.*attn_heads|heads",
        lambda n: 1 if n == 1 else 2,
    ),
    (r"rotary_dim", lambda n: min(n, 8)),
    (r"mrope_section", lambda n: n),
    (r"qk_rope_head_dim", lambda n: min(n, 8)),
    (
        r"kv_channels|d_kv|.*head_dim|.*head_size|attention_key_value_channels|.*_d_head|head_hidden_size|dim_head",
        lambda n: min(n, 16),
    ),
    (r".*lora_rank|.*_lora_.*|.*_low_rank_dim", lambda n: min(n, 16)),
    (
        r"(num|n)_experts_per_tok(en)?|moe_(k|topk)|num_experts_per_token|top_k_experts|num_selected_experts|moe_top_?k",
        lambda n: min(n, 2),
    ),
    (
        r".*(num|n)_(local_|routed_|total_)?experts|.*moe_num_experts|num_routed_experts|.*n_experts",
        lambda n: min(n, 4),
    ),
    (r"n_group|topk_group|num_expert_group.*", lambda n: 1),
    (r".*(n|num)_shared_experts", lambda n: min(n, 1)),
    (r"first_k_dense_replace|num_dense_layers", lambda n: min(n, 1)),
    (r"num_mtp_layers|num_nextn_predict_layers", lambda n: 0),
    (
        r"(num_)?(hidden|encoder|decoder|.*_hidden|.*encoder|.*decoder)_layers|n_layers?|num_layers|depth|layers"
        r"|num_.*_layers|n_.*_layers|.*_num_layers|.*_depth|.*_layers",
        lambda n: min(n, 2),
    ),
    (r"num_patches", lambda n: min(n, 16)),
    (
        r"(original_)?max_position_embeddings|n_positions|max_.*positions|n_ctx|max_seq(uence)?_len.*|seq_length|.*max_length"
        r"|context_length|max_2d_position_embeddings|max_.*_position_embeddings",
        lambda n: min(n, 64),
    ),
    (
        r"sliding_window(_size)?|window_size|attention_window|.*local_attention|attention_window_size|.*_window",
        lambda n: min(n, 4),
    ),
    (r"image_size|img_size|input_size|pretrain_image_size|.*image_size", lambda n: min(n, 32)),
    (r".*patch_size", lambda n: n if n < 8 else 8),
    (
        r"intermediate_size|.*intermediate_size.*|.*ffn_dim|.*ffn_size|n_inner|d_ff|d_inner|ffn_.*size|.*mlp_dim"
        r"|.*ffn_hidden_size|ff_dim|.*mlp_hidden.*|hidden_dim|dim_ff|inner_dim|.*feed_forward.*(size|dim)",
        lambda n: min(n, 48),
    ),
    (
        r"hidden_size|hidden_size_global|.*hidden_size|d_model|n_embd|.*embed_dim|embed_dim|emb_dim|dim|embedding_size|.*_hidden_dim|.*embedding_dim"
        r"|projection_dim|.*projection_dim|.*embedding_size|.*output_dim|latent_dim|d_embed|.*_d_model|.*proj_size|lru_width"
        r"|.*_width|width|.*pooler_output_size|rnn_width|d_emb.*|.*embd|.*_hidden_states_size",
        lambda n: min(n, WIDTH),
    ),
    (r".*mamba_d_state|state_size|ssm_state_size|time_step_rank|.*d_state", lambda n: min(n, 8)),
    (r".*chunk_size|mamba_chunk_size|chunk_length", lambda n: min(n, 8)),
    (r"hidden_sizes|.*hidden_sizes|embed_dims|embed_dimensions|encoder_hidden_sizes", lambda n: WIDTH),
    (r"depths|num_blocks|encoder_depths|layer_depths", lambda n: min(n, 1)),
    (r"num_conv_pos_embeddings", lambda n: min(n, 16)),
    (r"num_conv_pos_embedding_groups", lambda n: min(n, 2)),
    (r"conv_dim|conv_channels|tdnn_dim", lambda n: min(n, 16)),
    (r"xvector_output_dim|.*classifier_proj_size", lambda n: min(n, 16)),
    (r"num_(query_tokens|latents|queries)|.*num_latents", lambda n: min(n, 4)),
    (r"num_frames|.*num_frames", lambda n: min(n, 4)),
]
_SIZES = [(re.compile(pattern), small) for pattern, small in SIZES]
_ZERO = re.compile(r".*drop.*|.*_pdrop|.*jitter.*|mask_time_prob|mask_feature_prob|.*input_noise.*")
_TOKEN = re.compile(r".*(token|_tok|start|end|boi|eoi|bos|eos|pad)_?(id|index|ids)$")
_COUNTS = re.compile(r"(num_)?(hidden|encoder|decoder)_layers|n_layers?|num_layers|depth")
_INIT = re.compile(r"initializer_range|init_std|embed_init_std|init_range")


def shrunk(
    config: PreTrainedConfig, ids: dict[int, int] | None = None, overrides: dict | None = None
) -> PreTrainedConfig:
    """Return a tiny config like `config`.

    Args:
        config: any, usually the default of its class.
        ids: special ids beyond the vocabulary -> their replacements; added by this function.
        overrides: field -> value, or field -> overrides for the config in it.
    """
    ids = {} if ids is None else ids
    overrides = {**CONFIGS.get(config.model_type, {}), **(overrides or {})}
    fields = {f.name: f for f in dataclasses.fields(config)}
    selected = _selected_layers(config)
    kwargs: dict[str, Any] = {}
    for name in dict.fromkeys([*fields, *vars(config)]):
        value = _value(config, name)
        if isinstance(value, PreTrainedConfig):
            part = overrides.pop(name, None)
            kwargs[name] = part if isinstance(part, PreTrainedConfig) else shrunk(value, ids, part)
        elif name in fields and _default(fields[name]) is not None:
            kwargs[name] = _small(name, _default(fields[name]) if value == "auto" else value, ids)
        if selected and isinstance(value, list | tuple) and name in fields and len(value) == selected[1]:
            kwargs[name] = [_small(name, value[i], ids) for i in selected[2]]
    if selected and len(selected[2]) > 1:
        kwargs[selected[0]] = len(selected[2])
    if kwargs.get("num_key_value_heads") and _value(config, "num_key_value_heads") == _value(
        config, "num_attention_heads"
    ):
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]  # latent attention has no groups
    if "head_dim" in fields and kwargs.get("head_dim") is None and isinstance(kwargs.get("num_attention_heads"), int):
        kwargs["head_dim"] = kwargs["hidden_size"] // kwargs["num_attention_heads"]
    if "output_router_logits" in fields:
        kwargs["output_router_logits"] = True  # with it a model adds its router's loss
    if "pad_token_id" in fields and kwargs.get("pad_token_id") is None:
        kwargs["pad_token_id"] = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        kwargs["decoder_start_token_id"] = 2
    rope = getattr(config, "rope_parameters", None)
    if "rope_parameters" in fields and isinstance(rope, dict):
        kwargs["rope_parameters"] = _rope(rope, getattr(config, "partial_rotary_factor", None))
    for name in (
        "use_cache",
        "return_dict",
        "id2label",
        "label2id",
        "dtype",
        "architectures",
        "transformers_version",
        "output_hidden_states",
        "output_attentions",
    ):
        kwargs.pop(name, None)
    kwargs["num_labels"] = CLASSES
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(kwargs.get(name), dict):
            kwargs[name] = {**kwargs[name], **value}
        else:
            kwargs[name] = value
    return type(config)(**kwargs)


def _value(config: PreTrainedConfig, name: str) -> Any:
    """Return the value of a field; its default if layers differ in it; "auto" if it is derived from such a field."""
    field = next((f for f in dataclasses.fields(config) if f.name == name), None)
    if field is not None and isinstance(_default(field), str) and not isinstance(vars(config).get(name, ""), str):
        return "auto"
    try:
        return getattr(config, name, None)
    except AttributeError:
        raise
    except Exception:  # transformers has no single value for all layers
        return None if field is None else _default(field)


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _selected_layers(config: PreTrainedConfig) -> tuple[str, int, list[int]] | None:
    """Return (field with the number of layers, this number, selected layers: one of each kind in a list of kinds)."""
    counts = [
        name for name in ("num_hidden_layers", "num_layers", "n_layer") if isinstance(vars(config).get(name), int)
    ]
    if not counts:
        return None
    total = getattr(config, counts[0])
    lists = [
        v
        for k, v in vars(config).items()
        if isinstance(v, list | tuple) and len(v) == total and total > 4 and all(isinstance(x, str) for x in v)
    ]
    if not lists:
        return None
    kinds: dict[tuple, int] = {}
    for i, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(kind, i)
    selected = sorted(kinds.values())
    return counts[0], total, selected if len(selected) > 1 else [0, 1]


def _small(name: str, value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list | tuple):
        return type(value)(_small(name, item, ids) for item in value)
    if _INIT.fullmatch(name) and isinstance(value, float):
        return 0.2
    if _ZERO.fullmatch(name) and isinstance(value, int | float):
        return type(value)(0)
    if not isinstance(value, int):
        return value
    if _TOKEN.fullmatch(name):
        return ids.setdefault(value, VOCAB - 1 - len(ids)) if value >= VOCAB else value
    for pattern, small in _SIZES:
        if pattern.fullmatch(name):
            return small(value)
    return value


def _rope(rope: dict, partial: float | None) -> dict:
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _rope(v, partial) if isinstance(v, dict) else v for k, v in rope.items()}
    small = {k: v for k, v in rope.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    small |= {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0}
    if "partial_rotary_factor" in rope:
        small["partial_rotary_factor"] = max(rope["partial_rotary_factor"], 0.25)
    if rope.get("mrope_section"):
        half = int(8 * small.get("partial_rotary_factor", 1.0))
        parts = len(rope["mrope_section"])
        small["mrope_section"] = [half - (half // (parts + 1)) * (parts - 1)] + [half // (parts + 1)] * (parts - 1)
        small |= {k: v for k, v in rope.items() if k == "mrope_interleaved"}
    return small


def special_ids(config: PreTrainedConfig) -> set[int]:
    """Return all special ids of a config and of the configs in it."""
    ids = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            ids |= special_ids(value)
        elif _TOKEN.fullmatch(name):
            ids |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    return ids
