"""No file with NaN or infinite weights is written, by any writer."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build

from hf_distill.cache.writer import write_head
from hf_distill.core.logits import LazyLogits
from hf_distill.errors import RunError
from hf_distill.runner.model_factory import ModelFactory
from hf_distill.teachers import EMATeacher, PeerTeacher
from hf_distill.teachers.mtp.heads import MTPHeads, save_heads


def peer(value, folder):
    teacher = PeerTeacher(build("llama", 1))
    teacher.prepare(build("llama", 0), torch.device("cpu"))
    teacher.model.model.norm.weight.data[3] = value
    return lambda: teacher.save_pretrained(folder)


def heads(value, folder):
    module = MTPHeads(build("llama"), 1)
    next(module.parameters()).data[0] = value
    return lambda: save_heads(module, folder)


def ema(value, folder):
    student = build("llama")
    student.register_buffer("mask", torch.full((3,), float("-inf")))
    teacher = EMATeacher(0.5)
    teacher.prepare(student, torch.device("cpu"))
    teacher.on_train_begin(0)
    student.model.norm.weight.data[3] = value
    teacher.on_step_end(1, True)
    return lambda: teacher.save(str(folder), 0, True)


def cache_head(value, folder):
    folder.mkdir()
    return lambda: write_head(folder / "head.safetensors", LazyLogits(torch.ones(1, 2), torch.full((5, 2), value)))


def merged_adapter(value, folder):
    """Merging adds 10 to the largest value of float16, which is finite before."""
    base = build("llama").half()
    for weight in base.parameters():
        weight.data.fill_(torch.finfo(torch.float16).max if value != 1 else 1)
    adapters = get_peft_model(build("llama").half(), LoraConfig(target_modules=["q_proj"], r=1, lora_alpha=1))
    for name, weight in adapters.named_parameters():
        if "lora_" in name:
            weight.data.fill_(100.0)
    adapters.save_pretrained(folder)
    factory = SimpleNamespace(_base_student=lambda *args, **kwargs: base)
    return lambda: ModelFactory.merge(factory, folder, None)


WRITERS = [peer, heads, ema, cache_head, merged_adapter]


@pytest.mark.parametrize("writer", WRITERS)
def test_nonfinite_weights_are_not_written(writer, tmp_path):
    folder = tmp_path / "broken"
    write = writer(float("nan"), folder)
    before = {file: file.read_bytes() for file in folder.rglob("*")}
    with pytest.raises(RunError, match=r"weights of .* are not finite \(first: .*\)\. Nothing is written to .*broken"):
        write()
    assert {file: file.read_bytes() for file in folder.rglob("*")} == before


def test_the_average_of_a_mask_with_itself_is_the_mask():
    student = build("llama")
    student.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    teacher = EMATeacher(0.5)
    teacher.prepare(student, torch.device("cpu"))
    teacher.on_train_begin(0)
    student.model.norm.weight.data += 1
    teacher.on_step_end(1, True)
    with teacher.swapped_weights():
        assert student.mask.tolist() == [0.0, float("-inf")]
        torch.testing.assert_close(student.model.norm.weight.data, torch.full_like(student.model.norm.weight, 1.5))
    assert 0 < teacher.metrics()["teacher_weight_drift"] < 1


@pytest.mark.parametrize("writer", WRITERS)
def test_finite_weights_are_written(writer, tmp_path):
    writer(1.0, tmp_path / "finite")()
    assert list((tmp_path / "finite").glob("*.safetensors"))
