"""A tokenizer and a causal language model with fewer tokens."""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import DistillError
from ..model_types import model_type_of
from ..sharding import is_sharded
from .config_ids import configs_of, ids_in_configs, renumber_configs
from .selection import close_over
from .tokenizer_content import TokenizerContent

_PROBED_TOKENS = 16
_RELATIVE_TOLERANCE = 0.02  # of the largest logit; matrix products of other shapes round differently
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class TrimmedVocabulary(NamedTuple):
    """A model and its tokenizer without some of the tokens.

    model:     the model
    tokenizer: its tokenizer
    kept_ids:  for each id of these, the id that its token had before, in ascending order
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept_ids: list[int]


def trim_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep: Iterable[int]
) -> TrimmedVocabulary:
    """Copy a causal language model and its tokenizer with some of the tokens; neither argument is changed.

    A text whose tokens are all kept is encoded to the same tokens as before, with their new ids, and the logits of the
    model are those of the kept tokens, unchanged. Any other text is encoded to other, shorter tokens, and decodes to
    the same text as before.

    Args:
        model: the model; it may have more rows of embeddings than its tokenizer has tokens, which are left out.
        tokenizer: its tokenizer, a fast one of the model BPE, Unigram or WordPiece.
        keep: ids to keep. Special and added tokens, those of bytes or characters, and tokens that the kept ones are
            merged from are always kept.

    Returns:
        (the smaller model, its tokenizer, for each of its ids the id that the token had before).

    Raises:
        DistillError: the tokenizer or the model cannot be trimmed, or an id does not exist.
    """
    _vocabulary_modules(model)
    content = TokenizerContent(tokenizer)
    required = [index for index in ids_in_configs(*configs_of(model)) if index in content.tokens]
    trimmed, kept_ids = _trim_tokenizer(tokenizer, content, [*keep, *required])
    student = copy.deepcopy(model)
    trim_model(student, kept_ids)
    return TrimmedVocabulary(student, trimmed, kept_ids)


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, keep: Iterable[int]
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Copy a tokenizer with some of its tokens.

    Args:
        tokenizer: the tokenizer.
        keep: ids to keep; see `trim_vocabulary`.

    Returns:
        (tokenizer, for each of its ids the id that the token had before, in ascending order).

    Raises:
        DistillError: the tokenizer cannot be trimmed, or an id does not exist.
    """
    return _trim_tokenizer(tokenizer, TokenizerContent(tokenizer), keep)


def _trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, content: TokenizerContent, keep: Iterable[int]
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    kept_ids = close_over(content, [*keep, *tokenizer.all_special_ids])
    new_content = content.with_ids(kept_ids)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / _TOKENIZER).write_text(json.dumps(new_content, ensure_ascii=False), encoding="utf-8")
        _renumber_added_tokens(Path(folder) / _TOKENIZER_CONFIG, kept_ids)
        trimmed: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    # `datasets` finds rows that were tokenized before by the state of the tokenizer.
    trimmed.name_or_path = trimmed.init_kwargs["name_or_path"] = tokenizer.name_or_path
    expected = {content.tokens[old]: new for new, old in enumerate(kept_ids)}
    if trimmed.get_vocab() != expected or _merges_of(trimmed) != new_content["model"].get("merges"):
        raise DistillError(
            f"A {type(tokenizer).__name__} does not load a trimmed vocabulary from its tokenizer.json: load the "
            "tokenizer as PreTrainedTokenizerFast."
        )
    return trimmed, kept_ids


def trim_model(model: PreTrainedModel, kept_ids: Sequence[int]) -> None:
    """Leave only some rows in the embeddings and the output head of a causal language model, and renumber its configs.

    Args:
        model: the model, which is changed in place.
        kept_ids: for each new id the id that its token had before, in ascending order.

    Raises:
        DistillError: the model is quantized, sharded or not a causal language model, an id has no embedding, or other
            parts of the model depend on the ids.
    """
    embedding, head = _vocabulary_modules(model)
    size = len(embedding.weight)
    if kept_ids[-1] >= size:
        raise DistillError(
            f"The tokenizer has the id {kept_ids[-1]}, and the model's embedding has {size} rows: call "
            "model.resize_token_embeddings(len(tokenizer)) before the vocabulary is trimmed."
        )
    renumbered = [new for new, old in enumerate(kept_ids) if new != old] or [*range(len(kept_ids))]
    probe = torch.tensor(renumbered[:: -(-len(renumbered) // _PROBED_TOKENS)])
    rows = torch.tensor(kept_ids)
    logits = _logits(model, rows[probe])[..., rows]
    is_tied = head.weight is embedding.weight
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    _keep_rows(embedding, "weight", rows)
    embedding.num_embeddings = len(kept_ids)
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = new_ids.get(cast(int, embedding.padding_idx))
    if is_tied:
        head.weight = embedding.weight
    else:
        _keep_rows(head, "weight", rows)
    if getattr(head, "bias", None) is not None:
        _keep_rows(head, "bias", rows)
    head.out_features = len(kept_ids)
    renumber_configs(model, new_ids)
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        config.vocab_size = len(kept_ids)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(kept_ids)
    _check_trimmed(model, size, logits, _logits(model, probe))


def _vocabulary_modules(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    """Return the embedding and the output head of a model whose vocabulary can be trimmed."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise DistillError(f"A {name} is not a model of transformers, so its vocabulary cannot be trimmed.")
    if not model_type_of(model).is_decoder:
        raise DistillError(f"{name} is not a causal language model, and only their vocabulary can be trimmed.")
    if getattr(model, "is_quantized", False) or is_sharded(model):
        raise DistillError(
            f"The {name} is quantized or sharded, so rows of its embeddings cannot be removed: load it without "
            "quantization on one device."
        )
    embedding, head = cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings())
    tensors = [getattr(module, "weight", None) for module in (embedding, head)]
    if not all(isinstance(each, Tensor) and each.dim() == 2 for each in tensors) or len(embedding.weight) != len(
        head.weight
    ):
        raise DistillError(
            f"The vocabulary of a {name} cannot be trimmed: it needs an embedding and a linear output head of the same "
            "number of rows (get_input_embeddings, get_output_embeddings)."
        )
    return embedding, head


def _keep_rows(module: nn.Module, name: str, rows: Tensor) -> None:
    old = cast(nn.Parameter, getattr(module, name))
    kept_weight = old.detach()[rows.to(old.device)].clone()
    setattr(module, name, nn.Parameter(kept_weight, requires_grad=old.requires_grad))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    was_training = cast(nn.Module, model).training
    cast(nn.Module, model).eval()
    try:
        return model(input_ids=ids[None].to(model.device), use_cache=False).logits.float().cpu()
    finally:
        cast(nn.Module, model).train(was_training)


def _check_trimmed(model: PreTrainedModel, size: int, expected: Tensor, logits: Tensor) -> None:
    """Check that nothing else in a model depends on the number or the order of the ids."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    differing = [name for name, tensor in model.state_dict().items() if shapes.get(name) != tensor.shape]
    if differing:
        raise DistillError(
            f"The vocabulary of a {type(model).__name__} cannot be trimmed: {', '.join(differing[:3])} also depends "
            f"on the {size} ids."
        )
    if not torch.allclose(logits, expected, rtol=0, atol=_RELATIVE_TOLERANCE * float(expected.abs().max())):
        raise DistillError(
            f"The vocabulary of a {type(model).__name__} cannot be trimmed: other parts of the model depend on the ids "
            "(its logits changed)."
        )


def _renumber_added_tokens(path: Path, kept_ids: Sequence[int]) -> None:
    """Replace the ids of the added tokens in a tokenizer_config.json, if it has them."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in values:
        new_ids = {str(old): str(new) for new, old in enumerate(kept_ids)}
        tokens = values["added_tokens_decoder"].items()
        values["added_tokens_decoder"] = {new_ids[old]: token for old, token in tokens}
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _merges_of(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")


def kept_ids_of(tokenizer: Any, full: Any) -> list[int]:
    """Return for each id of a trimmed tokenizer the id of the same token in the tokenizer that it was made from.

    Args:
        tokenizer: the trimmed tokenizer.
        full: the other one.

    Raises:
        DistillError: it was not made from it.
    """
    if not is_trimmed(tokenizer, full):
        raise DistillError(
            "The student's tokenizer is not a trimmed one of the teacher's: it has other tokens, or they have another "
            "order. Give the tokenizer that trim_vocabulary returned, and the one that it was made from."
        )
    ids = full.get_vocab()
    return [ids[token] for token in _tokens_by_id(tokenizer)]


def is_trimmed(tokenizer: Any, full: Any) -> bool:
    """Whether all tokens of a tokenizer are those of another one, in the same order, and their ids have no gaps."""
    ids, of_trimmed = full.get_vocab(), tokenizer.get_vocab()
    full_ids = [ids.get(token, -1) for token in _tokens_by_id(tokenizer)]
    return (
        sorted(of_trimmed.values()) == [*range(len(full_ids))] and -1 not in full_ids and full_ids == sorted(full_ids)
    )


def _tokens_by_id(tokenizer: Any) -> list[str]:
    return [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
