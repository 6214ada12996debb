"""Batches for any class: ids, images, videos or sound, with the labels of its kind."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import DistillError

from .shrink import CLASSES, VOCAB, special_ids
from .table import INPUTS, ROWS, TARGET, TEXT, WIDTH


@dataclass(frozen=True)
class Kind:
    """What a class reads and predicts.

    name:     causal, masked, seq2seq, sequence or token
    modality: name of the main input
    decodes:  whether its forward makes decoder inputs from labels
    shift:    whether its loss shifts labels
    """

    name: str
    modality: str
    decodes: bool
    shift: bool

    @property
    def text(self) -> bool:
        return self.modality == "input_ids"

    def partner(self, cls: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
        """Another class that reads and predicts the same."""
        import transformers

        names = {
            ("causal", "input_ids"): ("LlamaForCausalLM", "GPT2LMHeadModel"),
            ("masked", "input_ids"): ("BertForMaskedLM", "DistilBertForMaskedLM"),
            ("seq2seq", "input_ids"): ("BartForConditionalGeneration", "T5ForConditionalGeneration"),
            ("sequence", "input_ids"): ("BertForSequenceClassification", "DistilBertForSequenceClassification"),
            ("token", "input_ids"): ("BertForTokenClassification", "DistilBertForTokenClassification"),
            ("sequence", "pixel_values"): ("ViTForImageClassification", "ConvNextForImageClassification"),
            ("sequence", "pixel_values_videos"): ("VJEPA2ForVideoClassification",),
            ("sequence", "input_values"): ("Wav2Vec2ForSequenceClassification", "HubertForSequenceClassification"),
        }.get((self.name, self.modality), ())
        others = [name for name in names if name != cls.__name__]
        return getattr(transformers, others[0]) if others else None


_KINDS = {
    "causal language model": "causal",
    "masked language model": "masked",
    "sequence-to-sequence language model": "seq2seq",
    "sequence classifier": "sequence",
    "image classifier": "sequence",
    "audio classifier": "sequence",
    "video classifier": "sequence",
    "token classifier": "token",
}


def reference_kind(model: PreTrainedModel) -> Kind:
    """Return the kind of a model, from its model type; for a refused model, from its main input."""
    from hf_distill.models.model_types import model_type_of

    try:
        name = _KINDS.get(model_type_of(model).name, "causal")
    except DistillError:
        name = "causal"
    if name in ("causal", "seq2seq"):
        name = "seq2seq" if model.config.is_encoder_decoder else "causal"
    decodes = name == "seq2seq" and "decoder_input_ids" in inspect.signature(model.forward).parameters
    named = inspect.signature(model.forward).parameters
    main = "input_ids" if type(model).__name__ in TEXT else model.main_input_name
    if main not in named:
        main = next((m for m in ("input_ids", "pixel_values", "input_features", "input_values") if m in named), main)
    if main == "inputs":
        main = "input_ids" if "input_ids" in named else "pixel_values"
    return Kind(name, main, decodes, name == "causal")


def batch_for(model: PreTrainedModel, kind: Kind, padded: bool) -> dict[str, Tensor]:
    """Return a batch of four rows, with label -100 for some tokens."""
    generator = torch.Generator().manual_seed(7)
    config = model.config
    batch = _main(model, kind, padded, generator)
    if kind.name == "sequence":
        batch["labels"] = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    elif kind.name == "seq2seq" or not kind.text:
        labels = _ids(config, (ROWS, TARGET), generator)
        if padded:
            labels[1, -2:] = labels[2, -4:] = -100
        batch["labels"] = labels
    else:
        shape = batch["input_ids"].shape
        labels = batch["input_ids"].clone() if kind.name == "causal" else _ids(config, shape, generator)
        if kind.name == "token":
            labels = torch.randint(0, CLASSES, shape, generator=generator)
        if kind.name == "causal":
            labels[0, :3] = -100
        else:
            labels[torch.rand(shape, generator=generator) < 0.4] = -100
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    for name in (*[c.__name__ for c in type(model).__mro__[:0:-1]], type(model).__name__):
        for key, make in INPUTS.get(name, {}).items():
            batch[key] = make(batch, config, generator)
    return {k: v for k, v in batch.items() if v is not None}


def _ids(config: PreTrainedConfig, shape: tuple, generator: torch.Generator) -> Tensor:
    usable = torch.tensor(sorted(set(range(3, VOCAB - 20)) - special_ids(config)))
    return usable[torch.randint(0, len(usable), shape, generator=generator)]


def _main(model: PreTrainedModel, kind: Kind, padded: bool, generator: torch.Generator) -> dict[str, Tensor]:
    config, name = model.config, kind.modality
    if kind.text:
        ids = _ids(config, (ROWS, WIDTH), generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, -2:] = mask[2, -4:] = 0
            pad = _first(config, "pad_token_id")
            ids = ids.masked_fill(mask == 0, 0 if pad is None or pad >= VOCAB else pad)
        eos = getattr(config, "eos_token_id", None)
        if kind.name == "sequence" and config.is_encoder_decoder and isinstance(eos, int):
            ids[torch.arange(ROWS), mask.sum(1) - 1] = eos  # such a class predicts from the last token of this id
        return {"input_ids": ids, "attention_mask": mask}
    if name in ("pixel_values", "pixel_values_videos"):
        size, channels = (
            _first(config, "image_size", "img_size", "crop_size", "size") or 32,
            _first(config, "num_channels") or 3,
        )
        size = (size, size) if isinstance(size, int) else tuple(size)
        frames = _first(config, "num_frames", "frames_per_clip")
        video = (frames,) if "Video" in type(model).__name__ else ()
        return {name: torch.randn(ROWS, *video, channels, *size, generator=generator)}
    if name == "input_features":
        bins = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_channels") or 80
        width = 2 * (_first(config, "max_source_positions") or 32)
        return {name: torch.randn(ROWS, bins, width, generator=generator)}
    if name == "input_values":
        return {name: torch.randn(ROWS, 1600, generator=generator)}
    return {}


def _first(config: PreTrainedConfig, *names: str):
    """Return the first of these fields that the config, or a config in it, has."""
    for part in (config, *[v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]):
        for name in names:
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return None
