"""Checks that the ids of teacher and student mean the same.

Models of one family often pad one tokenizer's vocabulary to different sizes (151936 and 152064): that works, over the
ids both have. Different tokenizers do not: a divergence over ids that mean different tokens teaches nonsense.
"""

from typing import Any

from torch import nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from ..data.training_templates import render_probes
from ..errors import DistillError
from ..hub import reading
from ..models.model_types import ModelType, model_type_of, unwrap_model

logger = logging.get_logger(__name__)


def check_teacher_student(
    teacher: nn.Module | PretrainedConfig,
    student: nn.Module,
    tokenizer: Any,
    processing_class: Any,
    path: str = "",
    **options: Any,
) -> None:
    """Refuse a model that cannot teach this student, before it is loaded where that can be told.

    Args:
        teacher: a model, or the config of one that is not loaded yet.
        student: unwrapped.
        tokenizer: the teacher's, or its processor; None: the one beside its files, if there is one on this machine.
        processing_class: the student's; None: likewise.
        path: of the teacher's files.
        options: of `from_pretrained`, for the teacher's tokenizer: revision, trust_remote_code, ...

    Raises:
        DistillError: it is the student itself, of another kind, of another tokenizer or of other classes.
    """
    if teacher is student:
        raise DistillError(
            "Teacher and student are the same object, and what is done to one would be done to the other. Load the "
            "model twice, or copy it."
        )
    task = model_type_of(student)
    if isinstance(teacher, nn.Module):
        own, config = model_type_of(teacher), unwrap_model(teacher).config
        path = path or getattr(unwrap_model(teacher), "name_or_path", "")
        check_kinds(own, task)
    else:
        config = teacher
    if not task.vocabulary:
        check_classes(config, student.config)
    tokenizer, processing_class = tokenizer_in(tokenizer), tokenizer_in(processing_class)
    sizes: Any = [getattr(c.get_text_config(), "vocab_size", None) for c in (config, student.config)]
    if None in sizes or not (task.vocabulary or student.main_input_name == "input_ids"):
        return  # nothing is read or predicted that a tokenizer makes
    check_vocabulary(
        tokenizer or local_tokenizer(path, **options),
        processing_class or local_tokenizer(getattr(student, "name_or_path", "")),
        sizes[0],
        sizes[1],
        is_warned=task.vocabulary,
    )


def check_kinds(teacher: ModelType, student: ModelType) -> None:
    """Refuse a teacher of another kind, or one whose predictions stand at other positions.

    Raises:
        DistillError: the kinds differ.
    """
    if teacher.name != student.name:
        raise DistillError(
            f"The teacher is a {teacher.name} and the student a {student.name}: use two models of one kind."
        )
    if teacher.shifts_labels != student.shifts_labels:
        one, other = ("teacher", "student") if teacher.shifts_labels else ("student", "teacher")
        raise DistillError(
            f"The {one} shifts its labels in its own loss and the {other} does not, so that their logits at one "
            "position are predictions of different tokens: use two models of one convention."
        )


def tokenizer_in(processing_class: Any) -> Any:
    """The tokenizer of a processor; anything else as it is."""
    return getattr(processing_class, "tokenizer", processing_class)


def local_tokenizer(path: str, **options: Any) -> Any:
    """The tokenizer beside a model's files, from this machine alone; None where there is none.

    Args:
        path: of the model.
        options: of `from_pretrained`; its code is not run unless they say so.
    """
    if not path:
        return None
    options = {"trust_remote_code": False, **options, "local_files_only": True}
    try:
        with reading(path):
            return tokenizer_in(AutoTokenizer.from_pretrained(path, **options))
    except DistillError:
        return None


def check_vocabulary(teacher: Any, student: Any, teacher_size: int, student_size: int, is_warned: bool = True) -> None:
    """Compare two tokenizers over the ids that both models have.

    Args:
        teacher: the teacher's tokenizer, or None if unknown.
        student: the student's tokenizer, or None if unknown.
        teacher_size: V_t.
        student_size: V_s.
        is_warned: whether unknown tokenizers are worth a warning.

    Raises:
        DistillError: some shared ids mean different tokens, or the tokenizers split text differently.
    """
    if not (hasattr(teacher, "get_vocab") and hasattr(student, "get_vocab")):
        if not is_warned:
            return
        unknown = " and ".join(n for n, t in (("teacher", teacher), ("student", student)) if t is None)
        logger.warning_once(
            f"The tokenizer of the {unknown or 'models'} is not known: ids below {min(teacher_size, student_size)} are "
            "assumed to mean the same tokens for both. Pass processing_class to the trainer and to FrozenTeacher to "
            "have it checked."
        )
        return
    tokens_t, tokens_s = ({i: token for token, i in tok.get_vocab().items()} for tok in (teacher, student))
    shared = range(min(teacher_size, student_size))
    differ = [i for i in shared if i in tokens_t and i in tokens_s and tokens_t[i] != tokens_s[i]]
    if differ:
        i = differ[0]
        raise DistillError(
            f"Teacher has {teacher_size} ids and student {student_size}; {len(differ)} ids differ in meaning (first: "
            f"{i} {tokens_t[i]!r} / {tokens_s[i]!r}). Use a teacher and a student with the same tokenizer."
        )
    lacking = sorted({*tokens_s} - {*tokens_t})
    if lacking:
        i = lacking[0]
        logger.warning_once(
            f"The teacher's tokenizer lacks {len(lacking)} ids of the student's (first: {i} {tokens_s[i]!r}): the "
            "teacher has not learned what they mean. Its soft labels are of little use where they occur, and rows with "
            f"ids from {teacher_size} on, which it cannot read at all, are refused."
        )
    probe = "The quick brown fox, 1234: naïve façade?\n\tdef f(x): return x"
    if teacher(probe, add_special_tokens=False)["input_ids"] != student(probe, add_special_tokens=False)["input_ids"]:
        raise DistillError(
            "Teacher and student share a vocabulary but split text into tokens differently. Use a teacher and a "
            "student with the same tokenizer."
        )
    _compare_templates(teacher, student)


def _compare_templates(teacher: Any, student: Any) -> None:
    """Warn where the two chat templates render some conversation differently; their sources may differ."""
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (teacher, student)]
    if None in templates or templates[0] == templates[1] or render_probes(teacher) == render_probes(student):
        return
    logger.warning_once(
        "The chat templates of teacher and student render conversations differently. Conversations are written by the "
        "student's, which the teacher was not trained on: give the student's tokenizer the teacher's chat_template, "
        "unless you mean it."
    )


def check_classes(teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Compare the classes of two classifiers.

    Raises:
        DistillError: different numbers of classes, or different names for the same index.
    """
    if teacher.num_labels != student.num_labels:
        raise DistillError(
            f"The teacher tells {teacher.num_labels} classes apart and the student {student.num_labels}: load the "
            f"student with num_labels={teacher.num_labels} and the teacher's id2label."
        )
    names = [{int(i): name for i, name in (c.id2label or {}).items()} for c in (teacher, student)]
    named = [n for n in names if n and not all(str(label).startswith("LABEL_") for label in n.values())]
    if len(named) == 2 and named[0] != named[1]:
        i = next(i for i in sorted({**named[0], **named[1]}) if named[0].get(i) != named[1].get(i))
        raise DistillError(
            f"Class {i} is {named[0].get(i)!r} for the teacher and {named[1].get(i)!r} for the student: give both the "
            "same id2label, in the same order as the labels of the data."
        )
