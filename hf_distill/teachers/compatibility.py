"""Checks that teacher and student are of one model type and that their token ids or classes mean the same.

Models of one family often pad the vocabulary of one tokenizer to different sizes (151936 and 152064). That is
supported: losses compare the ids that both models have. Different tokenizers are refused, because a divergence between
ids that mean different tokens is meaningless; `CrossTokenizerTeacher` compares spans of text instead.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..cache.fingerprints import tokenizer_fingerprint
from ..data.training_templates import render_probes
from ..errors import DistillError, raise_if_any
from ..hub import reading
from ..models.declared_types import type_as_teacher
from ..models.image_inputs import image_inputs
from ..models.model_call import accepts_any_input, input_names
from ..models.model_types import how_to_match, model_type_of, unwrap_model, with_config
from ..models.type_catalog import TOKEN, ModelType
from ..models.vocabulary import is_trimmed
from .base import OtherTokens, Teacher

logger = logging.get_logger(__name__)
_TRIMMED_TOKENIZER = (
    "The student's tokenizer is a trimmed one of the teacher's: pass TrimmedVocabularyTeacher(teacher) of "
    "hf_distill.teachers, which compares the ids that both have."
)
_OTHER_TOKENIZER = (
    "Use a teacher with the student's tokenizer, or set cross_tokenizer='alm' in DistillConfig (in a recipe "
    "`distill.cross_tokenizer: alm`), which compares spans of text instead of tokens."
)


def check_teacher_student(
    teacher: nn.Module | PretrainedConfig,
    student: nn.Module,
    tokenizer: Any,
    processing_class: Any,
    path: str = "",
    reads_own_tokens: bool = False,
    **options: Any,
) -> OtherTokens | None:
    """Check that a model can teach a student; the config alone is enough for all checks but those of the model type.

    Args:
        teacher: a model, or the config of a model that is not loaded yet.
        student: the student, with or without wrappers.
        tokenizer: the teacher's tokenizer or processor; None: the tokenizer in its folder, if it is on this machine.
        processing_class: the student's tokenizer or processor; None: likewise.
        path: folder or id of the teacher.
        reads_own_tokens: whether the teacher reads its own tokens, of the tokenizer `processing_class`.
        options: arguments of `from_pretrained` for the teacher's tokenizer: revision, trust_remote_code, ...

    Returns:
        the tokens of a classifier or regression model with another tokenizer, which can read inputs that the student
        does not read; None if the teacher reads the student's tokens.

    Raises:
        DistillError: the teacher is the student itself, or has another model type, another tokenizer or other classes.
    """
    student = unwrap_model(student)
    if isinstance(teacher, nn.Module) and unwrap_model(teacher) is student:
        raise DistillError(
            "Teacher and student are the same object, so training the student would change the teacher. Load the "
            "model twice, or copy it with copy.deepcopy."
        )
    student_type, student_config = model_type_of(student), getattr(student, "config", None)
    config: PretrainedConfig | None
    if isinstance(teacher, nn.Module):
        teacher_type = type_as_teacher(teacher, student)
        check_model_types(teacher_type, student_type)
        config = getattr(unwrap_model(teacher), "config", None)
        path = path or getattr(unwrap_model(teacher), "name_or_path", "")
    else:
        config, teacher_type = teacher, with_config(student_type, teacher, f"The teacher {path}")
    raise_if_any(student_type.output_type.different_settings(teacher_type.output_type))
    if not (isinstance(config, PretrainedConfig) and isinstance(student_config, PretrainedConfig)):
        return None  # nothing is declared of a module: the first batch shows its number of outputs
    if not student_type.vocabulary and student_type.has_classes:
        check_classes(config, student_config)
    tokenizer, processing_class = tokenizer_in(tokenizer), tokenizer_in(processing_class)
    sizes: Any = [getattr(each.get_text_config(), "vocab_size", None) for each in (config, student_config)]
    predicts_tokens = student_type.vocabulary or student_type.output_type.predicts_tokens
    if None in sizes or not (predicts_tokens or getattr(student, "main_input_name", None) == "input_ids"):
        return None  # the models neither read nor predict token ids
    tokenizer = tokenizer or local_tokenizer(path, **options)
    if reads_own_tokens:
        check_own_tokenizer(tokenizer, processing_class, sizes[0])
        return None
    processing_class = processing_class or local_tokenizer(getattr(student, "name_or_path", ""))
    if predicts_tokens:
        check_vocabulary(tokenizer, processing_class, sizes[0], sizes[1])
        return None
    try:
        check_vocabulary(
            tokenizer, processing_class, sizes[0], sizes[1], is_warned=False, remedy=tokens_remedy(student_type)
        )
    except DistillError as error:
        if student_type.output_type.compares_positions:
            raise
        return OtherTokens(str(error), tokenizer_fingerprint(tokenizer))
    return None


def tokens_remedy(student: ModelType) -> str:
    """Return what to do about a classifier or regression model whose teacher has another tokenizer."""
    if student.output_type.compares_positions:
        return (
            "Use a teacher with the student's tokenizer: start and end of an answer are positions among the tokens, "
            "which must be the same for both models."
        )
    keys = "`teacher_input_ids`, `teacher_attention_mask` and what else it reads"
    if student.auto_class == TOKEN.auto_class:
        return (
            f"Use a teacher with the student's tokenizer, or a collator that returns the teacher's tokens as {keys}, "
            "with one label for each word in `labels` and in `teacher_labels`; hf_distill.DualProcessorCollator can "
            "make them."
        )
    return (
        f"Use a teacher with the student's tokenizer, or a collator that returns the teacher's tokens as {keys}: "
        "data_collator=hf_distill.DualProcessorCollator(tokenizer, teacher_tokenizer) makes them from the column "
        "`text`, and `text_pair` if there is one."
    )


def check_model_types(teacher: ModelType, student: ModelType) -> None:
    """Check that the outputs of two model types can be compared, and that both or none shift labels in their own loss.

    Raises:
        DistillError: the model types or the positions of the predictions differ.
    """
    if not teacher.teaches(student):
        raise DistillError(
            f"The teacher is {teacher.with_article} and the student {student.with_article}: "
            f"{how_to_match(teacher, student)}"
        )
    if teacher.shifts_labels != student.shifts_labels:
        shifting, unshifting = ("teacher", "student") if teacher.shifts_labels else ("student", "teacher")
        raise DistillError(
            f"The {shifting} shifts its labels in its own loss and the {unshifting} does not, so their logits at "
            "one position predict different tokens: use two models that both shift the labels, or two that do not."
        )


def check_images_are_read(inputs: Mapping[str, Any], reader: nn.Module | Teacher, role: str) -> None:
    """Check that a model or teacher reads the images of a batch, which a call would otherwise leave out.

    Args:
        inputs: the batch that it reads.
        reader: a model without wrappers, or a teacher.
        role: name for the message: "student", "teacher" or "teacher 'name'".

    Raises:
        DistillError: it does not.
    """
    names = image_inputs(inputs)
    model = reader.model if isinstance(reader, Teacher) else reader
    if not names or "input_ids" not in inputs:
        return
    reads_text_only = isinstance(reader, Teacher) and reader.reads_text_only
    if not reads_text_only:
        if not isinstance(model, nn.Module) or accepts_any_input(model) or {*names} <= input_names(model):
            return
        if not isinstance(unwrap_model(model), PreTrainedModel) or not model_type_of(model).is_decoder:
            return
    kind = type(reader if reads_text_only or not isinstance(model, nn.Module) else unwrap_model(model)).__name__
    raise DistillError(
        f"The batch has images ({', '.join(names)}), and the {role} is a {kind}, which reads text only: it would read "
        "the placeholder tokens of the images as words. Use a frozen, EMA, snapshot, adapter-base or peer teacher "
        "which, like the student, is a vision-language model, or rows without images."
    )


def tokenizer_in(processing_class: Any) -> Any:
    """Return the tokenizer of a processor; return anything else unchanged."""
    return getattr(processing_class, "tokenizer", processing_class)


def local_tokenizer(path: str, **options: Any) -> Any:
    """Load the tokenizer in a model's folder without network access; return None if there is none.

    Args:
        path: folder or id of the model.
        options: arguments of `from_pretrained`; remote code is not run unless `trust_remote_code` is among them.
    """
    if not path:
        return None
    try:
        return load_tokenizer(path, **options, local_files_only=True)
    except DistillError:
        return None


def load_tokenizer(path: str, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        path: folder or id of the model.
        options: arguments of `from_pretrained`; remote code is not run unless `trust_remote_code` is among them.

    Raises:
        DistillError: there is none, or it cannot be loaded.
    """
    with reading(path):
        return tokenizer_in(AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False, **options}))


def check_vocabulary(
    teacher: Any,
    student: Any,
    teacher_size: int,
    student_size: int,
    is_warned: bool = True,
    remedy: str = _OTHER_TOKENIZER,
) -> None:
    """Check that two tokenizers agree on the ids that both models have.

    Args:
        teacher: the teacher's tokenizer, or None if unknown.
        student: the student's tokenizer, or None if unknown.
        teacher_size: V_t, rows of the teacher's vocabulary.
        student_size: V_s, rows of the student's vocabulary.
        is_warned: whether an unknown tokenizer is logged as a warning.
        remedy: what to do about another tokenizer, for the error message.

    Raises:
        DistillError: some shared ids mean different tokens, or the tokenizers split text differently.
    """
    if not (hasattr(teacher, "get_vocab") and hasattr(student, "get_vocab")):
        if not is_warned:
            return
        unknown = " and ".join(name for name, each in (("teacher", teacher), ("student", student)) if each is None)
        logger.warning_once(
            f"The tokenizer of the {unknown or 'models'} is not known: ids below {min(teacher_size, student_size)} are "
            "assumed to mean the same tokens for both. Pass processing_class to the trainer and to FrozenTeacher to "
            "check this."
        )
        return
    tokens_t, tokens_s = ({i: token for token, i in tok.get_vocab().items()} for tok in (teacher, student))
    shared = range(min(teacher_size, student_size))
    differ = [i for i in shared if i in tokens_t and i in tokens_s and tokens_t[i] != tokens_s[i]]
    if differ:
        i = differ[0]
        raise DistillError(
            f"The teacher has {teacher_size} ids and the student {student_size}, and {len(differ)} ids mean different "
            f"tokens (first: {i} is {tokens_t[i]!r} for the teacher and {tokens_s[i]!r} for the student). "
            f"{_TRIMMED_TOKENIZER if is_trimmed(student, teacher) else remedy}"
        )
    missing = sorted({*tokens_s} - {*tokens_t})
    if missing:
        i = missing[0]
        logger.warning_once(
            f"The teacher's tokenizer lacks {len(missing)} ids of the student's (first: {i} {tokens_s[i]!r}): the "
            "teacher was not trained on these tokens. Its soft labels are of little use where they occur, and rows "
            f"with ids from {teacher_size} on are refused, because the teacher has no embedding for them."
        )
    probe = "The quick brown fox, 1234: naïve façade?\n\tdef f(x): return x"
    if teacher(probe, add_special_tokens=False)["input_ids"] != student(probe, add_special_tokens=False)["input_ids"]:
        raise DistillError(f"Teacher and student share a vocabulary but split text into tokens differently. {remedy}")
    _compare_templates(teacher, student)


def check_own_tokenizer(stored: Any, given: Any, size: int) -> None:
    """Check that the tokenizer that is given for a teacher has the ids of the one that is stored with its model.

    Their chat templates may differ.

    Args:
        stored: the tokenizer that is stored with the model, or None if unknown.
        given: the tokenizer that makes the teacher's rows.
        size: V_t, rows of the teacher's vocabulary.

    Raises:
        DistillError: an id of the model means different tokens.
    """
    if stored is given or not (hasattr(stored, "get_vocab") and hasattr(given, "get_vocab")):
        return
    tokens, tokens_given = ({i: token for token, i in each.get_vocab().items() if i < size} for each in (stored, given))
    differ = [i for i, token in sorted(tokens_given.items()) if tokens.get(i, token) != token]
    if differ:
        i = differ[0]
        raise DistillError(
            f"{len(differ)} ids mean other tokens in the tokenizer that is given for the teacher than in the one that "
            f"is stored with its model (first: {i} is {tokens_given[i]!r} in the given one and {tokens[i]!r} in the "
            "stored one): give the tokenizer of the teacher's model, or leave it out (`processing_class` of "
            "CrossTokenizerTeacher, `tokenizer` of the teacher in a recipe)."
        )


def _compare_templates(teacher: Any, student: Any) -> None:
    """Warn if the two chat templates render some conversation differently, even if their texts differ otherwise."""
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (teacher, student)]
    if None in templates or templates[0] == templates[1] or render_probes(teacher) == render_probes(student):
        return
    logger.warning_once(
        "The chat templates of teacher and student render conversations differently. Conversations are rendered with "
        "the student's, on which the teacher was not trained. Give the student's tokenizer the teacher's "
        "chat_template, unless this is intended."
    )


def check_classes(teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Check that two classifiers have the same classes.

    Raises:
        DistillError: the numbers of classes differ, or the names of one class.
    """
    if teacher.num_labels != student.num_labels:
        raise DistillError(
            f"The teacher has {teacher.num_labels} classes and the student {student.num_labels}: load the "
            f"student with num_labels={teacher.num_labels} and the teacher's id2label."
        )
    names = [{int(i): name for i, name in (config.id2label or {}).items()} for config in (teacher, student)]
    named = [each for each in names if each and not all(str(label).startswith("LABEL_") for label in each.values())]
    if len(named) == 2 and named[0] != named[1]:
        i = next(i for i in sorted({**named[0], **named[1]}) if named[0].get(i) != named[1].get(i))
        raise DistillError(
            f"Class {i} is {named[0].get(i)!r} for the teacher and {named[1].get(i)!r} for the student: give both the "
            "same id2label, in the same order as the labels of the data."
        )
