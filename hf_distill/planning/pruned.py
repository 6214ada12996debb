"""The config of a student that is pruned from its teacher, from the teacher's config alone."""

from transformers import AutoTokenizer, PretrainedConfig

from ..errors import DistillError
from ..models.pruned_shape import PrunedShape
from ..models.pruning import check_kept_blocks, prune_config, top_layers
from ..models.vocabulary import TokenizerContent, most_frequent_ids
from ..models.width_pruning import pruned_config
from ..recipe.from_teacher import FromTeacher
from ..recipe.schema import Recipe
from ..runner.datasets import num_training_rows
from ..runner.model_loading import load_pretrained
from ..runner.training_arguments import arguments
from ..runner.trimmed_tokenizer import required_ids, trimmed_tokenizer
from .model_stats import ModelStats, meta_model


def student_config(cut: FromTeacher, teacher: PretrainedConfig, vocab_size: int | None = None) -> PretrainedConfig:
    """Return the config of a pruned student; for a plan it does not matter which units it keeps.

    Args:
        cut: the sizes of the student.
        teacher: the config of the teacher.
        vocab_size: number of tokens of the student, see `trimmed_vocab_size`; None: that of the teacher.

    Raises:
        DistillError: a size is not possible, or the sizes are still to be searched.
    """
    if cut.target_parameters is not None:
        raise DistillError(
            f"student.from_teacher.target_parameters is {cut.target_parameters}, so the sizes of the student are not "
            "known: `hf-distill prune` searches them; set the sizes that it prints."
        )
    depth = teacher.get_text_config().num_hidden_layers
    layers = tuple(
        check_kept_blocks(cut.layers, depth) if cut.layers else top_layers([0.0] * depth, cut.keep_layers or depth)
    )
    if cut.prunes_width:
        student = pruned_config(meta_model(teacher), PrunedShape(layers=layers, **cut.widths()))
    else:
        student = prune_config(teacher, layers, depth)
    if vocab_size is not None:
        student.get_text_config().vocab_size = vocab_size
    return student


def parameters_of(cut: FromTeacher, teacher: PretrainedConfig) -> int:
    """Count the parameters of a pruned student; see `student_config`."""
    return ModelStats.of(student_config(cut, teacher)).parameters


def trimmed_vocab_size(recipe: Recipe) -> int | None:
    """Return the number of tokens of a student that is trimmed from its teacher; None if it has all tokens.

    The data is read and tokenized if it decides the number.

    Raises:
        DistillError: The vocabulary cannot be trimmed as `student.from_teacher.vocab` says.
    """
    cut = recipe.student.from_teacher
    if cut is None or cut.vocab is None:
        return None
    tokenizer = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    if cut.vocab.size is not None:
        content = TokenizerContent(tokenizer)
        return len(most_frequent_ids(content, {}, cut.vocab.size, required_ids(recipe, tokenizer, content)))
    args = arguments(recipe)
    trimmed = trimmed_tokenizer(recipe, tokenizer, args.seed, num_training_rows(args))
    return None if trimmed is None else len(trimmed[1])
