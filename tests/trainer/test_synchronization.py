"""A training step waits for the device once for each micro-batch, and once before the optimizer."""

import inspect

import pytest
import torch
from gpu_sync import CPU_BRANCHES, PACKAGE, DeviceReads, reads_of_steps
from servers.teacher_servers import TOP_K, VLLMServer
from tiny import build, collate, rows

from hf_distill import DistillError
from hf_distill.cache import write_cache
from hf_distill.core.logits import upload
from hf_distill.core.targets import Targets
from hf_distill.teachers import CachedTeacher, EMATeacher, MTPTeacher, MultiTeacher, PeerTeacher, RemoteTeacher
from hf_distill.trainer.signal_handling import GracefulShutdown

ONE_READ = {("tolist", "core/targets.py:_read"): 1}
RELATIONS = [{"name": "hidden_relation", "weight": 0.1}, {"name": "value_relation", "weight": 0.1, "layers": "last:1"}]
CONFIGURATIONS = {
    "plain": ("llama", {}),
    "adaptive_kl": ("llama", {"divergence": "adaptive_kl"}),
    "hidden_states": ("llama", {"losses": [{"name": "hidden_mse"}, {"name": "hidden_cosine", "layers": "learned"}]}),
    "relations": ("llama", {"losses": RELATIONS}),
    "all_tokens_of_a_row": ("sequence", {"losses": RELATIONS[:1]}),
    "encoder": ("t5", {"losses": [RELATIONS[0] | {"stack": "encoder"}, {"name": "hidden_mse"}]}),
    "four_micro_batches": ("llama", {"gradient_accumulation_steps": 4}),
    "mtp": ("llama", {"teacher": lambda: MTPTeacher(3), "alpha": 0.0}),
    "checked_ids": ("llama", {"model": lambda: build("llama", vocab=120), "teacher": lambda: build("llama", 1)}),
    "several": (
        "llama",
        {"teacher": lambda: MultiTeacher({"a": build("llama", 1), "b": EMATeacher(0.5)}), "losses": RELATIONS[:1]},
    ),
    "bf16": ("llama", {"bf16": True, "use_cpu": True, "teacher": lambda: build("llama", 1)}),
    "peer": ("llama", {"teacher": lambda: PeerTeacher(build("llama", 1), mutual=True)}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_reads_once_for_each_micro_batch_and_once_before_the_optimizer(make_trainer, name):
    kind, options = CONFIGURATIONS[name]
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 100} | options
    options |= {key: make() for key, make in options.items() if callable(make)}
    trainer = make_trainer(kind, train_dataset=rows(kind, 64), **options)
    first, micro, optimizer = reads_of_steps(trainer, options["gradient_accumulation_steps"])
    assert micro == ONE_READ
    assert optimizer == {("tolist", "trainer/nonfinite.py:check_step"): 1}
    assert first.total() > 10, "the counter does not see the reads of the self-check"


@pytest.mark.parametrize("kind", ["hidden", "sampled", "top_k"])
@pytest.mark.parametrize("prefetch", [0, 1])  # a batch is announced between the steps, with one read
def test_a_cached_teacher_reads_the_examples_of_a_batch_at_once(make_trainer, tmp_path, kind, prefetch):
    data, options = rows("llama", 64), {} if kind == "hidden" else {"temperature": 2.0}
    write_cache(tmp_path / "cache", build("llama", 1), data, collator=collate, kind=kind, **options)
    teacher = CachedTeacher(str(tmp_path / "cache"))
    teacher.prefetch = prefetch
    trainer = make_trainer(
        teacher=teacher,
        train_dataset=data,
        gradient_accumulation_steps=2,
        logging_steps=100,
    )
    _, micro, optimizer = reads_of_steps(trainer)
    one_copy = {("cpu", "core/logits.py:to_host"): 1}
    assert micro == (ONE_READ if prefetch else ONE_READ | one_copy)
    announced = one_copy | ONE_READ if prefetch else {}  # ONE_READ of that copy, on the host
    assert optimizer == {("tolist", "trainer/nonfinite.py:check_step"): 1} | announced


def test_stored_signals_are_copied_from_pinned_memory_without_waiting(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pin") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: calls.append(options) or tensor)
    assert torch.equal(upload(torch.ones(2), torch.device("cuda", 0)), torch.ones(2))
    assert calls == ["pin", {"non_blocking": True}]


def test_the_counter_sees_reads_and_uploads_of_this_package_only():
    with DeviceReads() as recorder:
        assert torch.ones(2).bool().nonzero().tolist() == [[0], [1]]
    assert recorder.reads == []
    code = "import torch\ndef read(x):\n    return x.tolist(), torch.tensor(2, device='cpu'), x[x > 0], bool(x.max())\n"
    namespace: dict = {}
    exec(compile(code, f"{PACKAGE}sample.py", "exec"), namespace)
    with recorder:
        namespace["read"](torch.ones(2))
    assert [operation for operation, _ in recorder.reads] == ["tolist", "tensor", "index", "_local_scalar_dense"]
    assert {location for _, location in recorder.reads} == {"sample.py:read"}


@pytest.mark.parametrize("function", CPU_BRANCHES, ids=lambda function: function.__qualname__)
def test_functions_that_are_not_counted_look_at_the_device(function):
    assert '.device.type == "cpu"' in (source := inspect.getsource(function)) or '.device.type != "cpu"' in source


@pytest.mark.parametrize("prefetch", [0, 2])  # a batch is announced between the steps, with one read
def test_a_remote_teacher_reads_the_ids_of_a_batch_at_once(make_trainer, prefetch):
    with VLLMServer(build("llama", 1), max_top_k=TOP_K) as server:
        teacher = RemoteTeacher(server.url, top_k=TOP_K, prefetch=prefetch)
        options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 100, "temperature": 1.0}
        trainer = make_trainer("llama", teacher=teacher, train_dataset=rows("llama", 64), **options)
        _, micro, _ = reads_of_steps(trainer, 2)
    assert micro == ONE_READ | {("cpu", "core/logits.py:to_host"): 1}


def test_all_ranks_agree_on_a_signal_with_one_read(monkeypatch):
    class Arguments:
        world_size, device, save_strategy = 2, torch.device("cpu"), "steps"

    class Control:
        should_save = False

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(15))
    shutdown, control = GracefulShutdown(print), Control()
    with DeviceReads() as recorder:
        shutdown.on_step_end(Arguments(), None, control)
    assert control.should_save
    assert len(recorder.reads) == 1


def test_labels_beyond_the_vocabulary_are_named_from_the_same_read():
    batch = {"labels": torch.tensor([[1, 12, -100, -3]]), "attention_mask": torch.ones(1, 4)}
    with DeviceReads() as recorder:
        targets = Targets.from_batch(batch, shift=False)
    assert len(recorder.reads) == 1
    assert (targets.row_counts, targets.label_range) == ([3], (-3, 12))
    with pytest.raises(DistillError, match=r"2 labels are outside the student's 10 ids \(first: 12\)"):
        targets.check_ids(10)
