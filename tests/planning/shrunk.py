"""Small configs, and workloads and recipes that use them."""

from transformers import AutoConfig

from hf_distill.planning import ModelStats, Workload
from hf_distill.recipe import load_recipe

SMALL = "HuggingFaceTB/SmolLM2-135M"


def shrunk(family: str, width: int = 128, layers: int = 2, **changes):
    fields = dict(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=width // 8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return AutoConfig.for_model(family, **(fields | changes))


def workload_of(config, **fields) -> Workload:
    stats = ModelStats.of(config)
    return Workload(**(dict(student=stats, teacher=stats, batch=2, length=64) | fields))


def recipe(*overrides: str, name: str = "llama-70b-to-8b-nf4"):
    return load_recipe(name, overrides)


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
