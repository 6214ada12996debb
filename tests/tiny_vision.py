"""Tiny vision-language models of four families, their processors, and rows with no, one or two images."""

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
    set_seed,
)

VISION_KINDS = ("llava", "qwen", "idefics", "gemma")
SPECIAL = (
    *("<pad>", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<fake_token_around_image>"),
    *("<global-img>", "<end_of_utterance>", "<start_of_image>", "<end_of_image>"),
)
IMAGE_ID, VOCAB = SPECIAL.index("<image>"), len(SPECIAL) + 256
IMAGE_TEXT = {"qwen": "<|vision_start|><image><|vision_end|>", "gemma": "<start_of_image>"}  # else <image>
_TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{% if m.role == 'assistant' %}{% generation %}{% for part in m.content %}"
    "{{ part.text }}{% endfor %}</s>{% endgeneration %}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
_PIXELS, _PATCH = 16, 4  # of an image and a patch


class QwenProcessor(ProcessorMixin):
    """What `Qwen2_5_VLProcessor` does for images; the latter needs torchvision for videos."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.image_token_id = "<image>", IMAGE_ID
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        count = image_inputs["image_grid_thw"][image_idx].prod() // self.image_processor.merge_size**2
        return self.image_token * int(count)

    @property
    def model_input_names(self):
        return [*super().model_input_names, "mm_token_type_ids"]


def vlm(kind, seed=0, layers=2, width=16, vision_layers=2):
    """A tiny random vision-language model."""
    set_seed(seed)
    text = dict(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * width,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    vision = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=vision_layers, intermediate_size=32)
    vision |= dict(image_size=_PIXELS, patch_size=_PATCH)
    if kind == "llava":
        config = LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **vision, "patch_size": 8},
            text_config={"model_type": "llama", **text},
            image_token_id=IMAGE_ID,
            vision_feature_layer=-1,
        )
    elif kind == "qwen":
        sections = [width // 4 - 2 * (width // 12), width // 12, width // 12]
        config = Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": sections}},
            vision_config=dict(
                depth=vision_layers,
                hidden_size=16,
                num_heads=2,
                intermediate_size=32,
                out_hidden_size=width,
                patch_size=_PATCH,
                window_size=2 * _PATCH,
                fullatt_block_indexes=[0],
            ),
            image_token_id=IMAGE_ID,
            vision_start_token_id=SPECIAL.index("<|vision_start|>"),
            vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        )
    elif kind == "idefics":
        config = Idefics3Config(
            vision_config=vision, text_config={"model_type": "llama", **text}, image_token_id=IMAGE_ID, scale_factor=2
        )
    else:
        config = Gemma3Config(
            text_config={**text, "head_dim": width // 2, "sliding_window": 64, "query_pre_attn_scalar": width // 2},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_id=IMAGE_ID,
            boi_token_index=SPECIAL.index("<start_of_image>"),
            eoi_token_index=SPECIAL.index("<end_of_image>"),
        )
    config.initializer_range = 0.3
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # the default weights of the vision part hardly let images matter
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def vision_tokenizer():
    """A tokenizer whose ids are the bytes of a text, after some special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    special = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special,
        model_max_length=1024,
    )


def vision_processor(kind):
    """The processor of a model of `vlm`, with a chat template."""
    tokenizer, template = vision_tokenizer(), _TEMPLATE.replace("IMAGE", IMAGE_TEXT.get(kind, "<image>"))
    size = {"height": _PIXELS, "width": _PIXELS}
    if kind == "llava":
        images = CLIPImageProcessorPil(size=size, crop_size=size)
        return LlavaProcessor(images, tokenizer, 8, "default", template, num_additional_image_tokens=1)
    if kind == "qwen":
        pixels = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
        return QwenProcessor(Qwen2VLImageProcessorPil(patch_size=_PATCH, size=pixels), tokenizer, template)
    if kind == "idefics":
        edge = {"longest_edge": _PIXELS}
        images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    return Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, template, image_seq_length=4)


def picture(number, height=16, width=16):
    """A random image."""
    generator = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def vision_examples(count=8, counts=(1, 0, 2, 1)):
    """Rows of `prompt`, `completion` and `images`; the number of images differs, and their sizes too."""
    return [
        {
            "images": [picture(10 * i + j, 16, (16, 24)[j]) for j in range(counts[i % len(counts)])],
            "prompt": [{"role": "user", "content": f"What is {i}?" + "?" * (i % 3)}],
            "completion": [{"role": "assistant", "content": "It is " + "very " * (i % 3) + f"close to {i}."}],
        }
        for i in range(count)
    ]
