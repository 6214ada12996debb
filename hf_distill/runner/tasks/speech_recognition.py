"""The task automatic-speech-recognition: transcripts of recordings, by models such as Whisper."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar, cast

from datasets import Audio, Dataset, Value
from torch import nn
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ...core.results import ModelFacts
from ...data import Examples
from ...data.task_collators import SpeechCollator, waveform
from ...errors import DistillError
from ...models.blocks import get_layer_stack
from ...models.model_types import unwrap_model
from ...models.pruning import cut_student
from ...recipe.tasks import SPEECH
from ...trainer.seq2seq import DistillSeq2SeqConfig, DistillSeq2SeqTrainer
from ..model_loading import load_pretrained
from ..pruning import Pruner
from .columns import ColumnTask
from .media import check_files, check_no_nulls, check_same_processing
from .previews import Preview
from .text_classification import check_texts

logger = logging.get_logger(__name__)


class SpeechRecognition(ColumnTask):
    """Recordings with their transcripts, as in run_speech_recognition_seq2seq of transformers."""

    name = SPEECH.name
    auto_class: ClassVar = AutoModelForSpeechSeq2Seq
    trainer_class: ClassVar = DistillSeq2SeqTrainer
    config_class: ClassVar = DistillSeq2SeqConfig

    def load_processor(self) -> ProcessorMixin:
        """Load the processor, after checking that it makes the same features as that of each teacher."""
        recipe = self.recipe
        processor = load_pretrained(AutoProcessor, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
        if not (hasattr(processor, "feature_extractor") and hasattr(processor, "tokenizer")):
            raise DistillError(
                f"The processor of {recipe.tokenizer_model} is a {type(processor).__name__}, and a processor with a "
                "feature extractor and a tokenizer is needed, such as that of Whisper."
            )
        check_same_processing(recipe, processor, AutoProcessor, "feature_extractor")
        if language := recipe.data.language:
            self._set_language(cast(Any, processor).tokenizer, language)
        return processor

    def _set_language(self, tokenizer: Any, language: str) -> None:
        try:
            tokenizer.set_prefix_tokens(language=language, task="transcribe")
            _ = tokenizer.prefix_tokens  # raises for an unknown language
        except (AttributeError, ValueError) as error:
            raise DistillError(f"data.language is {language!r}, which the tokenizer does not know: {error}") from error

    def make_rows(self, sources: Mapping[str, Dataset], processor: Any) -> dict[str, Dataset]:
        """Tokenize the transcripts, and leave out rows that are too long for the model."""
        return {name: self._rows(rows, processor, name) for name, rows in sources.items()}

    def _rows(self, rows: Dataset, processor: Any, name: str) -> Dataset:
        where = self.where(name)
        check_texts(rows, ["text"], where)
        rows = self._with_audio(rows, processor.feature_extractor.sampling_rate, name)
        rows = rows.map(
            lambda texts: {"labels": processor.tokenizer(texts).input_ids},
            input_columns="text",
            remove_columns="text",
            batched=True,
        )
        rate, seconds = processor.feature_extractor.sampling_rate, self._chunk_seconds(processor)
        most = min(
            self.recipe.data.max_length, getattr(self._config, "max_target_positions", self.recipe.data.max_length)
        )
        short = rows.filter(lambda labels: len(labels) <= most, input_columns="labels")
        if seconds is not None:
            short = short.filter(lambda audio: len(waveform(audio, rate)) <= seconds * rate, input_columns="audio")
        if dropped := len(rows) - len(short):
            limits = f"{most} tokens" + ("" if seconds is None else f" or {seconds} s of audio")
            text = f"{where}: {dropped} of {len(rows)} rows have more than {limits}"
            if dropped == len(rows):
                raise DistillError(f"{text}, and no row is left: cut the recordings.")
            logger.warning(f"{text} and are left out.")
        return short

    def _chunk_seconds(self, processor: Any) -> float | None:
        """Return the length of audio that the feature extractor reads; None if it reads any length."""
        return getattr(processor.feature_extractor, "chunk_length", None)

    def _with_audio(self, rows: Dataset, sampling_rate: int, name: str) -> Dataset:
        """Return rows whose audio is decoded at the sampling rate of the model."""
        feature, where = rows.features["audio"], self.where(name)
        check_no_nulls(rows, "audio", where)
        if isinstance(feature, dict) and {"array", "sampling_rate"} <= {*feature}:
            return rows
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
            check_files(rows, "audio", where, self.path(name))
        elif not isinstance(feature, Audio):
            raise DistillError(
                f"{where}: the column of the audio has the type {feature}; it must hold audio files, paths of audio "
                "files, or mappings with `array` and `sampling_rate`."
            )
        if find_spec("torchcodec") is None:
            raise DistillError(
                f"{where}: audio files are decoded with torchcodec, which is not installed. Run: pip install torchcodec"
            )
        return rows.cast_column("audio", Audio(sampling_rate=sampling_rate, num_channels=1))

    @property
    def _config(self) -> Any:
        return load_pretrained(AutoConfig, self.recipe.tokenizer_model, revision=self.recipe.tokenizer_revision)

    def preview_row(self, number: int, row: dict, source: str, processor: Any) -> Preview:
        """Return the length of a recording and its transcript."""
        rate, ids = processor.feature_extractor.sampling_rate, row["labels"]
        seconds = len(waveform(row["audio"], rate)) / rate
        spans = [(f"audio of {seconds:.2f} s -> ", False), (processor.tokenizer.decode(ids), True)]
        return Preview(number, source, len(ids), len(ids), spans, f"{len(ids)} target tokens")

    def collator(self, processor: Any) -> SpeechCollator:
        """Return the collator, which makes the features."""
        return SpeechCollator(processor, self._config.decoder_start_token_id, tuple(self.recipe.data.sources))

    def adapt_student(self, model: nn.Module) -> nn.Module:
        """Freeze the encoder if the recipe says so, and set the language of generation."""
        student = unwrap_model(model)
        if self.recipe.student.freeze_encoder:
            cast(nn.Module, student.get_encoder()).requires_grad_(False)
        if self.recipe.data.language and student.generation_config is not None:
            generation_config = cast(Any, student.generation_config)
            generation_config.language, generation_config.task = self.recipe.data.language, "transcribe"
        return model

    def cut(self, teacher: PreTrainedModel, rows: Examples, pruner: Pruner) -> tuple[nn.Module, ModelFacts]:
        """Cut the decoder and the encoder of a student from the teacher."""
        cut = self.recipe.student.from_teacher
        assert cut is not None
        facts: ModelFacts = {}
        if cut.decoder_layers:
            facts["decoder_layers_kept"] = cut.decoder_layers
        if cut.encoder_layers:
            facts["encoder_layers_kept"] = cut.encoder_layers
        student = cut_student(teacher, encoder_layers=cut.encoder_layers, decoder_layers=cut.decoder_layers)
        return student, facts

    def num_layers(self, model: nn.Module) -> int:
        """Return the number of layers of encoder and decoder together."""
        return sum(len(get_layer_stack(model, stack).blocks) for stack in ("encoder", "decoder"))
