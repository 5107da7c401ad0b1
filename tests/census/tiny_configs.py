"""Tiny configs of the causal LMs in transformers: the defaults of a kind, with its sizes replaced by small ones.

Attributes are recognised by their names, which most kinds share. What a kind needs besides stands in `OVERRIDES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUM_LAYERS, VOCAB_SIZE, PAD = 4, 160, 127
_FIRST_SPECIAL = 130  # token ids from here on stand for images and the like: prompts have none

# Attributes that hold the same thing under several names, and its small value.
_SMALL = (
    (
        NUM_LAYERS,
        """num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers layers num_blocks
        num_decoder_layers num_encoder_layers max_window_layers conf_num_hidden_layers""",
    ),
    (
        VOCAB_SIZE,
        """vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
        position_embedding_size codebook_size num_embeddings encoder_hash_byte_group_vocab""",
    ),
    (
        32,
        """hidden_size d_model n_embd emb_dim embed_dim embedding_dim embedding_size out_hidden_size projection_dim
        attention_hidden_size text_hidden_size encoder_hidden_size word_embed_proj_dim hidden_size_global
        lru_width output_dim patch_embed_hidden_size input_embedding_size output_embedding_size mamba_d_ssm
        decoder_hidden_size output_channels kv_channels num_pos_feats vision_output_dim backbone_hidden_size
        vision_hidden_size image_text_hidden_size post_conv_in_channels projector_input_dim projector_output_dim
        adapter_out_dim image_token_embed_dim base_channels latent_channels resampler_hidden_size qk_dim
        merged_hidden_size projection_hidden_size conv_output_size adapter_input_size adapter_in_dim image_size""",
    ),
    (
        64,
        """intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size d_ff dff dim_ff
        d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size
        shared_expert_intermediate_size projector_hidden_size alignment_intermediate_size
        projection_intermediate_size post_conv_out_channels post_conv_mid_channels moe_hidden_size""",
    ),
    (
        128,
        """max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length
        max_source_positions max_target_positions num_position_embeddings max_vit_seq_len""",
    ),
    (
        24,
        """moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        shared_experts_intermediate_size share_expert_dim""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        num_sliding_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts
        linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads ssm_num_heads
        conf_num_attention_heads resampler_n_heads resampler_heads num_query_tokens latent_query_num
        resampler_n_latents resampler_num_latents num_image_tokens qk_rope_head_dim rotary_dim""",
    ),
    (
        8,
        """head_dim v_head_dim swa_head_dim swa_v_head_dim global_head_dim qk_nope_head_dim index_head_dim d_kv d_head
        dim_head attention_head_size linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head
        mamba_head_dim mamba_headdim hidden_size_per_layer_input ssm_state_size mamba_d_state state_size
        attention_head_dim index_topk chunk_size mamba_chunk_size laurel_rank mamba_dt_rank time_step_rank
        o_lora_rank gated_norm_rank query_pre_attn_scalar d_rel hc_lowrank adapter_rank resampler_head_dim
        resampler_dim_head attention_chunk_size router_hidden_size indexer_head_dim""",
    ),
    # With fewer, many scores of the indexer are 0, and which of them are the largest is left to chance.
    (
        16,
        """index_n_heads kv_lora_rank q_lora_rank patch_size sliding_window sliding_window_size local_attention
        attention_window_size window_size rel_extent keep_window_size patch_dim""",
    ),
    (
        2,
        """num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts linear_num_key_heads
        n_shared_experts num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups
        num_global_key_value_heads""",
    ),
    (12, "qk_head_dim"),
    (2, "n_group"),
    (1, "first_k_dense_replace topk_group num_nextn_predict_layers moe_num_shared_experts"),
)
SMALL = {name: int(value) for value, names in _SMALL for name in names.split()}
_DEPTHS = _SMALL[0][1].split()
# Key and value heads are as many as the queries', or one, where they are by default.
_KEY_VALUE_HEADS = {"num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"}

# What a kind needs beside the table, by the dotted path of the attribute.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_GLM_V = {"text_config.rope_parameters": {**_MROPE, "mrope_section": [4, 2, 2]}, "text_config.num_attention_heads": 2}
_SHARED_KEYS = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 100,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1},
    "chameleon": {"vocabulary_map": {"<image>": 131, "IMGIMGAZ": 132}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge": {"text_config.rope_parameters": _MROPE},
    "dbrx": {
        "attn_config.kv_n_heads": 2,
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.ffn_hidden_size": 32,
    },
    "deepseek_ocr2": {"text_config.num_experts_per_tok": 2, "text_config.mlp_layer_types": ["dense", *["sparse"] * 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 24,
    },
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config.head_dim": 16},
    "dots3_note_text": {"head_dim": 16},
    "emu3": {"vocabulary_map": {"<image>": 131}, "image_token_id": 131},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [24, 16],
        "text_config.rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
    },
    "florence2": {
        "vision_config.embed_dim": [8, 8, 8, 8],
        "vision_config.num_heads": [2] * 4,
        "vision_config.num_groups": [2] * 4,
        "vision_config.depths": [1] * 4,
    },
    "gemma3n": {f"text_config.{name}": value for name, value in _SHARED_KEYS.items()},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": {**_SHARED_KEYS, "per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}}},
    "glm46v": _GLM_V,
    "glm4v": _GLM_V,
    "glm4v_moe": {
        "text_config.rope_parameters": _MROPE,
        "text_config.num_attention_heads": 2,
        "text_config.head_dim": 16,
    },
    "glm5_next": {"text_config.index_kpool": 4},
    "glm_ocr": {**_GLM_V, "text_config.head_dim": 16},
    "glmga": _GLM_V,
    "granite4_vision": {
        "text_config.hidden_size": 64,
        "vision_config.hidden_size": 64,
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config.head_dim": 8, "text_config.rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}},
    "hrm_text": {"num_layers_per_stack": 2, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "mistral": {"sliding_window": None},  # as all that were published since 2023
    "molmo2": {"adapter_config.vision_feature_layer": [2, 1]},
    "moshi": {"audio_encoder_config.codebook_size": 128},
    "muse_spark": {"audio_config.hidden_sizes": [8, 8, 16, 16], "audio_config.depths": [1, 1, 1, 1]},
    "musicgen": {"audio_encoder.codebook_size": 128},
    "musicgen_melody": {"audio_encoder.codebook_size": 128},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "nemotron_h_omni": {"text_config.n_groups": 2, "vision_config.video_temporal_patch_size": 2},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "prophetnet": {"pad_token_id": 0},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCAB_SIZE,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCAB_SIZE,
    },
    "step3p7": {"text_config.sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


def tiny_config(kind: str) -> Any:
    """A config of the model type `kind`, so small that its model takes a few hundred kilobytes."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    small = _small(config_class(**_nested(DEFAULTS.get(kind, {}))))
    return config_class(**_merged(small, _nested(OVERRIDES.get(kind, {}))))


# What the class itself needs, where its defaults contradict each other.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
}


def _small(config: Any) -> dict[str, Any]:
    """The arguments that make the config again, with small sizes."""
    given = config.to_dict()
    layers = _kept_layers(config, given)
    small: dict[str, Any] = {}
    for place, (name, value) in enumerate(given.items()):
        nested = vars(config).get(name)
        if hasattr(nested, "to_dict"):
            small[name] = {**_small(nested), "model_type": nested.model_type}
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = _FIRST_SPECIAL + place % (VOCAB_SIZE - _FIRST_SPECIAL)
        elif name == "rope_parameters" and isinstance(value, dict):
            small[name] = _small_rope(value)
        elif name == "per_layer_config":
            small[name] = _small_layers(value, layers, given)
        elif isinstance(value, list) and layers and len(value) == layers[-1]:
            small[name] = [SMALL[name] if name in SMALL else value[i] for i in layers[:-1]]
        elif name in SMALL and type(value) is int:
            small[name] = _small_value(name, value, given)
    small |= {name: token for name, token in {"bos_token_id": 1, "eos_token_id": 5}.items() if name in given}
    return {**small, "pad_token_id": _pad(given.get("pad_token_id"))}


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings that were stretched are so from 32 tokens on."""
    small = {name: _small_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    return {**small, "original_max_position_embeddings": 32, "factor": 4.0} if "factor" in small else small


def _pad(default: Any) -> int:
    """A padding token that prompts do not hold; roberta's positions begin behind it, so that it must be small there."""
    return default if isinstance(default, int) and default == 1 else PAD


def _small_layers(value: Mapping[str, Any], layers: list[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """What single layers have in the place of the common attributes, in the same proportion to these."""
    return {
        str(layers.index(int(place))): {
            name: max(1, _small_value(name, given[name], given) * own // given[name]) if name in SMALL else own
            for name, own in value[place].items()
        }
        for place in value
        if int(place) in layers[:-1]
    }


def _small_value(name: str, value: int, given: Mapping[str, Any]) -> int:
    if name in _KEY_VALUE_HEADS:
        heads = given.get(name.replace("key_value", "attention"))
        return SMALL["num_attention_heads"] if value == heads else min(value, SMALL[name])
    if name == "head_dim" and value == given.get("qk_rope_head_dim"):
        return SMALL["qk_rope_head_dim"]
    return min(value, SMALL[name])


def _kept_layers(config: Any, given: Mapping[str, Any]) -> list[int]:
    """The layers of the default config that a tiny one keeps, one of each sort first; at last how many there were."""
    depth = next((given[n] for n in _DEPTHS if isinstance(given.get(n), int)), 0)
    if depth < NUM_LAYERS:
        return []
    per_layer = [value for value in given.values() if isinstance(value, list) and len(value) == depth]
    sorts = [repr([value[i] for value in per_layer]) for i in range(depth)]
    firsts = sorted(sorts.index(sort) for sort in set(sorts))[:NUM_LAYERS]
    others = [i for i in range(depth) if i not in firsts]
    return [*sorted([*firsts, *others[: NUM_LAYERS - len(firsts)]]), depth]


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in dotted.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _merged(base: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in other.items():
        is_inner = isinstance(value, dict) and isinstance(base.get(name), dict)
        base[name] = _merged(base[name], value) if is_inner else value
    return base
