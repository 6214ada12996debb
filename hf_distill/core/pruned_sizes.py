"""The sizes of models in words. Imports no torch."""

from collections.abc import Mapping

_WORDS = {
    "layers": "{:,} layers",
    "hidden_size": "hidden size {:,}",
    "intermediate_size": "intermediate size {:,}",
    "moe_intermediate_size": "intermediate size of experts {:,}",
    "num_attention_heads": "{:,} attention heads",
    "num_experts": "{:,} experts",
    "vocab_size": "{:,} tokens",
}


def shape_text(sizes: Mapping[str, int | None]) -> str:
    """Return sizes in words, such as "20 layers, hidden size 448, 6 attention heads".

    Args:
        sizes: name of a size in the config, or "layers" -> its value; None leaves it out.
    """
    given = ((text, size) for name, text in _WORDS.items() if (size := sizes.get(name)) is not None)
    return ", ".join(text.format(size).removesuffix("s" if size == 1 else "") for text, size in given)


def millions(parameters: int | None) -> str:
    """Return a number of parameters in millions, such as "134.5M"; "-" for None."""
    return "-" if parameters is None else f"{parameters / 1e6:,.1f}M"
