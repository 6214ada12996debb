"""The types of models that can be distilled: language models, classifiers of text, images, audio and videos, regression
models, question answering, multiple choice, CTC models of speech, semantic segmentation, and encoders without a head.

The classes of a classifier are treated as a small vocabulary. `model_types` finds the type of a model.
"""

from dataclasses import dataclass, replace
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..errors import DistillError
from ..losses.output_types import (
    BERNOULLI_OUTPUTS,
    CLASS_OUTPUTS,
    DISTRIBUTION_OUTPUTS,
    EMBEDDING_OUTPUTS,
    FRAME_OUTPUTS,
    PIXEL_OUTPUTS,
    REAL_VALUE_OUTPUTS,
    ROW_CLASS_OUTPUTS,
    SPAN_OUTPUTS,
    OutputType,
)

_FIXED_CLASSES = (DISTRIBUTION_OUTPUTS, CLASS_OUTPUTS, ROW_CLASS_OUTPUTS)


@dataclass(frozen=True)
class ModelType:
    """A type of model.

    name:          name for messages
    auto_class:    auto class of transformers
    pipeline:      pipeline tag of the Hub
    shifts_labels: whether the model's loss shifts labels; for `CAUSAL`, the default if it cannot be measured
    vocabulary:    whether V is the size of a tokenizer's vocabulary, and not a number of classes
    output_type:   what the outputs are, which decides the losses, the targets and the metrics
    has_classes:   for models without a vocabulary: whether `num_labels` of the config is V, and `id2label` has the
                   names of the classes. False if V is known from the logits only, as for the choices of a row
    is_declared:   whether the user named the type, with `model_type=`; the class of the model did not decide it
    placeholders:  ids of the tokens at which the model reads images, videos or sound; they are no target tokens
    """

    name: str
    auto_class: str | None
    pipeline: str | None
    shifts_labels: bool
    vocabulary: bool
    output_type: OutputType = DISTRIBUTION_OUTPUTS
    has_classes: bool = True
    is_declared: bool = False
    placeholders: frozenset[int] = frozenset()

    @property
    def is_decoder(self) -> bool:
        """Whether it is a language model that continues a row of tokens, which may stand for text or images."""
        return self.name in (CAUSAL.name, IMAGE_TEXT.name)

    @property
    def with_article(self) -> str:
        """The name with its article, for messages."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def has_declared_size(self) -> bool:
        """Whether V is known without a forward: as the size of a vocabulary, or from `num_labels`."""
        return self.vocabulary or self.has_classes or self.output_type.predicts_tokens

    @property
    def has_fixed_classes(self) -> bool:
        """Whether the outputs are distributions over the same V ids or classes in each batch, as caches store them."""
        return self.output_type in _FIXED_CLASSES and self.has_declared_size

    def num_outputs(self, model: nn.Module) -> int | None:
        """Return V, the number of ids or classes that a model without wrappers predicts; None: its outputs tell it."""
        if self.is_declared or not self.has_declared_size or not isinstance(model, PreTrainedModel):
            return None
        if self.has_classes and not self.vocabulary:
            return cast(int, model.config.num_labels)
        head = model.get_output_embeddings()
        # In peft's copy of a tied head `out_features` is that of the embedding; the original module has the right one.
        head = getattr(head, "original_module", None) or head
        return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size

    def vocabulary_size(self, model: nn.Module, reader: str) -> int:
        """Return V for something that needs it before the model has run.

        Args:
            model: the model, without wrappers.
            reader: what needs it, for the error message.

        Raises:
            DistillError: only the outputs of the model tell it.
        """
        if (size := self.num_outputs(model)) is None:
            raise DistillError(
                f"{reader} needs the number of ids of the student before it has run, and {type(model).__name__} does "
                "not declare it: use a transformers model without `model_type`, or a frozen, EMA or peer teacher."
            )
        return size

    def teaches(self, student: "ModelType") -> bool:
        """Whether a model of this type can teach one of the student's type.

        If the user named the type, classes with the same outputs can: `model_type="classification"` with an image
        classifier as teacher. A language model can teach a vision-language model on rows without images.
        """
        if self.name == student.name or (self.is_decoder and student.is_decoder):
            return True
        has_same_outputs = self.output_type is student.output_type and self.vocabulary == student.vocabulary
        return student.is_declared and (student.auto_class is None or has_same_outputs)


CAUSAL = ModelType(
    "causal language model", "AutoModelForCausalLM", "text-generation", shifts_labels=True, vocabulary=True
)
IMAGE_TEXT = ModelType(
    "vision-language model", "AutoModelForImageTextToText", "image-text-to-text", shifts_labels=True, vocabulary=True
)
MASKED = ModelType("masked language model", "AutoModelForMaskedLM", "fill-mask", shifts_labels=False, vocabulary=True)
SEQ2SEQ = ModelType(
    "sequence-to-sequence language model",
    "AutoModelForSeq2SeqLM",
    "text2text-generation",
    shifts_labels=False,
    vocabulary=True,
)
SPEECH_SEQ2SEQ = ModelType(
    "speech sequence-to-sequence model",
    "AutoModelForSpeechSeq2Seq",
    "automatic-speech-recognition",
    shifts_labels=False,
    vocabulary=True,
)
SEQUENCE = ModelType(
    "sequence classifier",
    "AutoModelForSequenceClassification",
    "text-classification",
    shifts_labels=False,
    vocabulary=False,
    output_type=ROW_CLASS_OUTPUTS,
)
IMAGE = replace(
    SEQUENCE,
    name="image classifier",
    auto_class="AutoModelForImageClassification",
    pipeline="image-classification",
)
AUDIO = replace(
    SEQUENCE,
    name="audio classifier",
    auto_class="AutoModelForAudioClassification",
    pipeline="audio-classification",
)
VIDEO = replace(
    SEQUENCE,
    name="video classifier",
    auto_class="AutoModelForVideoClassification",
    pipeline="video-classification",
)
MULTI_LABEL = replace(SEQUENCE, name="multi-label classifier", output_type=BERNOULLI_OUTPUTS)
REGRESSION = replace(SEQUENCE, name="regression model", output_type=REAL_VALUE_OUTPUTS)
TOKEN = ModelType(
    "token classifier",
    "AutoModelForTokenClassification",
    "token-classification",
    shifts_labels=False,
    vocabulary=False,
    output_type=CLASS_OUTPUTS,
)
QUESTION_ANSWERING = ModelType(
    "question answering model",
    "AutoModelForQuestionAnswering",
    "question-answering",
    shifts_labels=False,
    vocabulary=False,
    output_type=SPAN_OUTPUTS,
    has_classes=False,
)
MULTIPLE_CHOICE = ModelType(
    "multiple choice model",
    "AutoModelForMultipleChoice",
    "multiple-choice",
    shifts_labels=False,
    vocabulary=False,
    output_type=ROW_CLASS_OUTPUTS,
    has_classes=False,
)
NEXT_SENTENCE = ModelType(
    "next sentence classifier",
    "AutoModelForNextSentencePrediction",
    "text-classification",
    shifts_labels=False,
    vocabulary=False,
    output_type=ROW_CLASS_OUTPUTS,
    has_classes=False,
)
CTC = ModelType(
    "CTC model",
    "AutoModelForCTC",
    "automatic-speech-recognition",
    shifts_labels=False,
    vocabulary=False,
    output_type=FRAME_OUTPUTS,
    has_classes=False,
)
SEMANTIC_SEGMENTATION = ModelType(
    "semantic segmentation model",
    "AutoModelForSemanticSegmentation",
    "image-segmentation",
    shifts_labels=False,
    vocabulary=False,
    output_type=PIXEL_OUTPUTS,
)

ENCODER = ModelType(
    "encoder",
    "AutoModel",
    "feature-extraction",
    shifts_labels=False,
    vocabulary=False,
    output_type=EMBEDDING_OUTPUTS,
    has_classes=False,
)

GENERATIVE_TYPES = (
    CAUSAL,
    IMAGE_TEXT,
    SEQ2SEQ,
    SPEECH_SEQ2SEQ,
)  # the config tells whether a model of them has an encoder
TYPE_BY_NAME = {  # the names for `model_type=`
    "classification": SEQUENCE,
    "multi_label_classification": MULTI_LABEL,
    "regression": REGRESSION,
    "token_classification": TOKEN,
    "image_classification": IMAGE,
    "audio_classification": AUDIO,
    "video_classification": VIDEO,
    "question_answering": QUESTION_ANSWERING,
    "multiple_choice": MULTIPLE_CHOICE,
    "semantic_segmentation": SEMANTIC_SEGMENTATION,
    "next_sentence_prediction": NEXT_SENTENCE,
    "causal_lm": CAUSAL,
    "vision_language": IMAGE_TEXT,
    "masked_lm": MASKED,
    "seq2seq_lm": SEQ2SEQ,
    "speech_seq2seq": SPEECH_SEQ2SEQ,
    "encoder": ENCODER,
}
