"""Exceptions from the rules of `shrink.py` and `inputs.py`, for model types and classes."""

import torch

_MROPE = {"rope_parameters": {"mrope_section": [4, 2, 2]}}

# model_type of a config, or the name of a class (which wins) -> overrides of its config's fields.
CONFIGS: dict[str, dict] = {
    # heads x head width = expand x hidden width
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "prophetnet": {"disable_ngram_loss": True},  # its additional loss cannot be separated from the cross entropy
    # lists with one entry for each layer
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "muse_spark_vision": {"num_hidden_layers": 4, "layer_types": None},
    "cvt": {"depth": [1, 2, 3]},
    "hgnet_v2": {
        "hidden_sizes": [16, 16, 16, 16],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "textnet": {"stem_out_channels": 32},
    "efficientnet": {"hidden_dim": 2560},
    "flint": {"mlp_only_layers": [0]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "step3p7_text": {"sliding_window": 4},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "mobilebert": {"normalization_type": "layer_norm"},  # without one, rounding grows from layer to layer
    "blip-2": {"image_token_id": 90},
    "instructblip": {"image_token_id": 90},
    "instructblipvideo": {"video_token_id": 90},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    # what a default config leaves out
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 97, "pad_token_id": 1, "mask_token_id": 96, "position_embedding_type": "rotary"},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "nemotron": {"num_key_value_heads": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 90, "vision_end_token_id": 89},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90, "vision_end_token_id": 89},
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    # sections and parts that must add up to widths
    **dict.fromkeys(
        (
            "glm4v_text",
            "glm_image_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "glm46v_text",
            "cosmos3_edge_text",
        ),
        _MROPE,
    ),
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "qwen2_5_omni_text": {"rope_parameters": {"mrope_section": [4, 2, 2]}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "hunyuan_vl_text": {"rope_parameters": {"mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "mistral4": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 8 / 24}},
    "longcat_flash": {"head_dim": 8},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (3, 3),
        "lsh_attn_chunk_length": 3,
        "local_attn_chunk_length": 3,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "bros": {"hidden_size": 64},
    "lilt": {"hidden_size": 48},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "bit": {"num_groups": 2, "embedding_size": 16},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 2, 2],
        "key_dim": [16, 16, 16],
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "moshi": {"num_codebooks": 4},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 768},
    "granite4_vision": {
        "vision_config": {"hidden_size": 128},
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "2/4",
    },
    "wavtokenizer_encoder": {"codebook_dim": 32},
    "dots3_note_audio_encoder": {"adapter_in_dim": 32, "adapter_input_size": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_input_size": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron3_5_transcribe_word_timestamp": {"chunk_right_context": 2},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "kosmos-2": {"latent_query_num": 4},
    "swin": {"window_size": 2, "image_size": 64},
    "donut-swin": {"window_size": 2, "image_size": 64},
    "bridgetower_vision_model": {"hidden_size": 64},
    "mobilevitv2": {"image_size": 64},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 2, "patch_size": 8},
    "mimi": {"upsample_groups": 32, "num_quantizers": 4},
    "perceiver": {
        "num_latents": 4,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 1,
        "num_cross_attention_heads": 1,
        "image_size": 32,
        "max_position_embeddings": 9,
    },
}


ROWS, WIDTH, TARGET = 4, 9, 7  # of every batch; TARGET is the width of labels apart from the inputs
_IMAGE_TOKENS = 4


def _numbers(*shape):
    return lambda batch, config, generator: torch.randn(ROWS, *shape, generator=generator)


def _words(width):
    return lambda batch, config, generator: torch.randint(3, 60, (ROWS, width), generator=generator)


def _boxes(batch, config, generator):
    return torch.rand(ROWS, WIDTH, 4, generator=generator).sort(-1).values


def _with_image(batch, config, generator):
    """The ids, the first of which stand for an image."""
    ids = batch["input_ids"].clone()
    ids[:, :_IMAGE_TOKENS] = config.image_token_id
    return ids


def _with_video(batch, config, generator):
    """The ids, the first of which stand for two frames."""
    ids = batch["input_ids"].clone()
    ids[:, : 2 * _IMAGE_TOKENS] = config.video_token_id
    return ids


def _image_first(batch, config, generator):
    return (torch.arange(WIDTH) < _IMAGE_TOKENS).long().expand(ROWS, WIDTH)


def _patches(batch, config, generator):
    """Row and column of each patch, and its pixels."""
    places = torch.arange(1.0, 10).expand(ROWS, 2, 9).transpose(1, 2)
    return torch.cat([places, torch.randn(ROWS, 9, 768, generator=generator)], -1)


_INSTRUCT_VIDEO = {"input_ids": _with_video, "qformer_input_ids": _words(5)}
_INSTRUCT = {"input_ids": _with_image, "qformer_input_ids": _words(5)}

# Name of a class, or of one that it derives from -> more inputs, as functions of (batch, config, generator).
INPUTS: dict[str, dict] = {
    "BrosPreTrainedModel": {"bbox": _boxes},
    "BrosSpadeELForTokenClassification": {
        "bbox_first_token_mask": lambda batch, config, generator: torch.ones(ROWS, WIDTH, dtype=torch.bool)
    },
    "UdopPreTrainedModel": {"bbox": _boxes},
    "Molmo2ForConditionalGeneration": {
        "mm_token_type_ids": lambda batch, config, generator: torch.zeros(ROWS, WIDTH, dtype=torch.long)
    },
    "ViltPreTrainedModel": {"pixel_values": _numbers(3, 32, 32)},
    "BridgeTowerForMaskedLM": {"pixel_values": _numbers(3, 32, 32)},
    "BlipForConditionalGeneration": {"pixel_values": _numbers(3, 32, 32)},
    "Blip2ForConditionalGeneration": {"pixel_values": _numbers(3, 32, 32), "input_ids": _with_image},
    "InstructBlipForConditionalGeneration": {"pixel_values": _numbers(3, 32, 32)} | _INSTRUCT,
    "InstructBlipVideoForConditionalGeneration": {"pixel_values": _numbers(2, 3, 32, 32)} | _INSTRUCT_VIDEO,
    "Kosmos2ForConditionalGeneration": {
        "pixel_values": _numbers(3, 32, 32),
        "image_embeds_position_mask": _image_first,
    },
    "FSMTForConditionalGeneration": {"decoder_input_ids": _words(TARGET)},  # it makes none of labels
    "PPFormulaNetForConditionalGeneration": {"decoder_input_ids": _words(TARGET)},
    "Pix2StructForConditionalGeneration": {"flattened_patches": _patches},
    "ASTForAudioClassification": {"input_values": _numbers(64, 128)},
    "Speech2TextForConditionalGeneration": {"input_features": _numbers(40, 80)},
    "CanaryForConditionalGeneration": {"input_features": _numbers(64, 128)},
    "CohereAsrForConditionalGeneration": {"input_features": _numbers(64, 128)},
    "Wav2Vec2BertForSequenceClassification": {"input_features": _numbers(40, 160)},
    "Siglip2ForImageClassification": {
        "pixel_values": _numbers(16, 192),
        "pixel_attention_mask": lambda batch, config, generator: torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": lambda batch, config, generator: torch.tensor([[4, 4]] * ROWS),
    },
}

# Classes whose main input is not text, though they predict tokens of one.
TEXT = (
    "BridgeTowerForMaskedLM",
    "BlipForConditionalGeneration",
    "Blip2ForConditionalGeneration",
    "InstructBlipForConditionalGeneration",
    "InstructBlipVideoForConditionalGeneration",
    "Kosmos2ForConditionalGeneration",
)

# Name of a class -> why no comparison is possible here, though nothing is wrong with it.
CANNOT: dict[str, str] = {
    **dict.fromkeys(
        (
            "FastVlmForConditionalGeneration",
            "Gemma3nForConditionalGeneration",
            "PerceptionLMForConditionalGeneration",
            "TimmWrapperForImageClassification",
        ),
        "needs timm, which is not installed",
    ),
    **dict.fromkeys(
        ("LayoutLMv2ForSequenceClassification", "LayoutLMv2ForTokenClassification"),
        "needs detectron2, which is not installed",
    ),
    "DinatForImageClassification": "needs natten, which is not installed",
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "reads keys and values of another model's layers, so it does not run alone",
    ),
    "VoxtralRealtimeForConditionalGeneration": "reads sound and text of one length, frame by frame",
    **dict.fromkeys(
        ("KyutaiSpeechToTextForConditionalGeneration", "MoshiForConditionalGeneration"),
        "reads several streams of codes of sound at once",
    ),
    **dict.fromkeys(
        ("SeamlessM4TTextToUnitForConditionalGeneration", "SeamlessM4Tv2TextToUnitForConditionalGeneration"),
        "is a part of another model and reads its hidden states",
    ),
    **dict.fromkeys(
        ("Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
        "has no forward of its own, only generate",
    ),
    **dict.fromkeys(
        (
            "Qwen2_5OmniTalkerForConditionalGeneration",
            "Qwen3OmniMoeTalkerForConditionalGeneration",
            "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration",
        ),
        "is a part of another model and reads its hidden states",
    ),
    "ClvpModelForConditionalGeneration": "aligns speech and text; it predicts no tokens",
    **dict.fromkeys(
        ("MusicgenForConditionalGeneration", "MusicgenMelodyForConditionalGeneration"),
        "predicts several streams of codes of sound at once",
    ),
    "Apertus1p5ForConditionalGeneration": "its ids of images and sound have places that no small vocabulary has",
    "PI0ForConditionalGeneration": "predicts a robot's actions, from its state and images",
    "Llama4ForConditionalGeneration": "its own forward fails without images (transformers 5.24)",
}
