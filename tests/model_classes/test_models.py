"""A sample of `make test-models`: one class for each mechanism, compared with a plain reference."""

import gc

import pytest
import transformers

from .compare import ComparedClass

SAMPLE = [
    # class, its role in the pair, scale of the logits, padded
    # causal: a plain head, a tied head, scales and soft caps after the head
    ("LlamaForCausalLM", "same", "small", True),
    ("CohereForCausalLM", "same", "large", False),
    ("GraniteForCausalLM", "teacher", "large", True),
    ("Gemma2ForCausalLM", "same", "large", True),
    ("RecurrentGemmaForCausalLM", "same", "large", False),
    ("NanoChatForCausalLM", "same", "large", True),
    *([("DoryForCausalLM", "same", "small", True)] if hasattr(transformers, "DoryForCausalLM") else []),  # since 5.24
    ("ProphetNetForCausalLM", "same", "large", True),
    # routers, states, hybrids
    ("MixtralForCausalLM", "same", "small", True),
    ("Qwen3MoeForCausalLM", "student", "large", True),
    ("MambaForCausalLM", "same", "large", False),
    ("RwkvForCausalLM", "same", "small", False),
    ("JambaForCausalLM", "same", "small", True),
    # labels that the loss of the model does not shift, although it is in the causal mapping
    ("BartForCausalLM", "same", "small", False),
    ("XLNetLMHeadModel", "same", "large", True),
    ("XLMWithLMHeadModel", "same", "small", True),
    # text of multimodal models
    ("Qwen2VLForConditionalGeneration", "same", "small", True),
    ("VoxtralForConditionalGeneration", "same", "small", True),
    ("LlavaForConditionalGeneration", "student", "large", True),
    # masked
    ("BertForMaskedLM", "same", "small", True),
    ("EsmForMaskedLM", "same", "small", True),
    ("FNetForMaskedLM", "student", "large", True),
    # encoder-decoders
    ("T5ForConditionalGeneration", "same", "large", True),
    ("NllbMoeForConditionalGeneration", "same", "small", True),
    ("BartForConditionalGeneration", "same", "small", True),
    ("M2M100ForConditionalGeneration", "student", "large", True),
    ("WhisperForConditionalGeneration", "same", "small", False),
    ("EncoderDecoderModel", "teacher", "large", True),
    # classifiers
    ("LlamaForSequenceClassification", "same", "large", True),
    ("BartForSequenceClassification", "same", "small", True),
    ("T5ForSequenceClassification", "student", "large", True),
    ("BertForTokenClassification", "teacher", "large", True),
    ("UMT5ForTokenClassification", "same", "small", True),
    ("ViTForImageClassification", "same", "large", False),
    ("ResNetForImageClassification", "student", "large", False),
    ("LevitForImageClassificationWithTeacher", "same", "large", False),
    ("PvtForImageClassification", "same", "small", False),
    ("Wav2Vec2ForSequenceClassification", "same", "small", False),
]
REFUSED = [
    ("BrosSpadeEEForTokenClassification", "same"),
    ("PPLCNetForImageClassification", "teacher"),
    ("CsmDepthDecoderForCausalLM", "student"),
    ("DiaForConditionalGeneration", "same"),
    ("CsmForConditionalGeneration", "same"),  # its loss needs labels of all codebooks
    ("ShieldGemma2ForImageClassification", "same"),
]
_partners: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _release_models():
    """Release the models of this file at its end."""
    yield
    _partners.clear()
    gc.unfreeze()  # the fixture of all tests froze them


@pytest.mark.parametrize(("name", "role", "scale", "padded"), SAMPLE, ids=lambda value: str(value))
def test_loss_and_gradients_are_those_of_the_reference(name, role, scale, padded):
    pair = ComparedClass.of(getattr(transformers, name), _partners).pair(role, scale, padded)
    assert pair.status == "compared", pair.reason


@pytest.mark.parametrize(("name", "role"), REFUSED)
def test_a_class_without_logits_or_with_another_loss_is_refused(name, role):
    pair = ComparedClass.of(getattr(transformers, name), _partners).pair(role, "large", False)
    assert pair.status == "refused", pair.reason
