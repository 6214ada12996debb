"""How many tokens a teacher with another tokenizer reads for each token of the student, measured on the data."""

from itertools import islice

from transformers import AutoTokenizer

from ..data.alignment.teacher_rows import TeacherRowMaker
from ..recipe.schema import Recipe
from ..runner.datasets import collator_of, first_rows
from ..runner.model_loading import load_pretrained, load_teacher_tokenizers

_EXAMPLES, _ROWS = 100, 32  # of each source, and of their mixture


def teacher_token_ratio(recipe: Recipe) -> float:
    """Return the tokens of the primary teacher per token of the student on the first rows; 1 for the same tokenizer.

    Raises:
        DistillError: a tokenizer or the data cannot be read, or the tokenizers cannot be aligned.
    """
    others = load_teacher_tokenizers(recipe)
    if not others:
        return 1.0
    names: list[str | None] = [spec.name for spec in recipe.teachers] or [None]
    primary = names[[spec.source_teacher for spec in recipe.all_teachers].index(recipe.primary_teacher)]
    other = next(each for each in others if each.name == primary)
    tokenizer = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    maker = TeacherRowMaker(tokenizer, other.tokenizer, name=other.name)
    collator = collator_of(recipe.data, tokenizer)
    of_student = of_teacher = 0
    for row in islice(first_rows(recipe, tokenizer, 0, _EXAMPLES, others), _ROWS):
        batch = collator([row])
        of_student += batch["input_ids"].numel()
        of_teacher += next(values for key, values in maker(batch).items() if "teacher_input_ids" in key).numel()
    return of_teacher / max(of_student, 1)
