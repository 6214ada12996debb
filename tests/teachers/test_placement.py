"""Teachers on another device than the student, or spread over devices, give the signals of one on its device."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from second_device import SECOND, second_device
from tiny import build, collate, rows
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_distill import DistillError, DistillTrainer, FrozenTeacher
from hf_distill.losses.objective import objective
from hf_distill.teachers import MultiTeacher
from hf_distill.teachers.loading import TeacherLoader
from hf_distill.trainer.distiller import Distiller

CPU = torch.device("cpu")


def teacher_model(kind="llama", **options):
    return build(kind, 1, layers=3, width=48, **({"vocab": 101} if kind == "llama" else {}), **options)


def spread(model):
    """Put the last layers of a llama on the second device, with the hooks of accelerate's `dispatch_model`."""
    parts = dict.fromkeys((model.model.layers[1], model.model.layers[2], model.model.norm, model.lm_head), SECOND)
    parts |= dict.fromkeys((model.model.embed_tokens, model.model.rotary_emb, model.model.layers[0]), CPU)
    for module, device in parts.items():
        add_hook_to_module(module.to(device), AlignDevicesHook(execution_device=device))
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta", "lm_head": "meta"}
    return add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))


PLACEMENTS = {"alone": lambda model: model.to(SECOND), "spread": spread}
FEATURES = [
    {"name": "hidden_relation", "weight": 0.1},
    {"name": "hidden_mse", "weight": 0.1},
    {"name": "value_relation", "weight": 0.1},
    {"name": "attention_kl", "weight": 0.1},
]


def logs_of(make_trainer, teacher, **options):
    trainer = make_trainer(teacher=teacher, use_cpu=True, **options)
    trainer.train()
    metrics = trainer.evaluate()
    return [*trainer.state.log_history[:4], metrics]


def assert_close(logs, expected):
    for one, other in zip(logs, expected, strict=True):
        for name in one:
            if "time" not in name and "second" not in name:
                assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "sequence"])
def test_a_teacher_on_another_device_trains_the_student_as_one_on_its_device(make_trainer, kind):
    options = dict(kind=kind, self_check=kind == "llama")
    expected = logs_of(make_trainer, teacher_model(kind), folder="one", **options)
    with second_device():
        teacher = teacher_model(kind).to(SECOND)
        logs = logs_of(make_trainer, teacher, **options)
        assert all(p.device == SECOND for p in teacher.parameters())
    assert_close(logs, expected)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_losses_on_features_of_a_teacher_elsewhere(make_trainer, place):
    def models():
        student, teacher = build("llama", 0), teacher_model()
        for model in (student, teacher):
            model.set_attn_implementation("eager")
        return student, teacher

    student, teacher = models()
    expected = logs_of(make_trainer, teacher, folder="one", model=student, losses=FEATURES)
    with second_device():
        student, teacher = models()
        assert_close(logs_of(make_trainer, PLACEMENTS[place](teacher), model=student, losses=FEATURES), expected)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_hidden_states_are_moved_and_the_output_head_is_copied_once(make_trainer, place):
    with second_device() as copies:
        teacher = PLACEMENTS[place](teacher_model())
        trainer = make_trainer(teacher=teacher, use_cpu=True, max_steps=3, self_check=False)
        trainer.train()
        copies.clear()
        trainer.evaluate()
        trainer.evaluate()
    from_teacher = [shape for shape, dtype, where in copies if where == "to the CPU" and dtype.is_floating_point]
    from_teacher = [shape for shape in from_teacher if shape != (1, 1, 1)]  # placeholder in place of the logits
    assert from_teacher
    assert {len(shape) for shape in from_teacher} == {2}
    assert {shape[1] for shape in from_teacher} == {48}  # hidden states [T, H]
    assert (101, 48) not in from_teacher


def test_the_output_head_is_copied_in_the_first_step(make_trainer):
    with second_device() as copies:
        teacher = teacher_model().to(SECOND)
        make_trainer(teacher=teacher, use_cpu=True, max_steps=3, self_check=False).train()
    assert [shape for shape, _, where in copies if where == "to the CPU"].count((101, 48)) == 1


def test_the_output_head_is_copied_again_after_its_user_changed_it_through_data(make_trainer):
    with second_device() as copies:
        teacher = teacher_model().to(SECOND)
        trainer = make_trainer(teacher=teacher, use_cpu=True, self_check=False)
        trainer.evaluate()
        copies.clear()
        teacher.lm_head.weight.data.mul_(2)
        trainer.evaluate()
        trainer.evaluate()
    assert [shape for shape, _, where in copies if where == "to the CPU"].count((101, 48)) == 1


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_teacher_on_a_second_gpu_leaves_one_gpu_to_the_trainer(make_trainer, monkeypatch, elsewhere):
    """Without a launcher a Trainer uses DataParallel over all GPUs that it sees."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with second_device():
        teacher = teacher_model().to(SECOND if elsewhere else CPU)
        if not elsewhere:
            with pytest.raises(DistillError, match=r"DataParallel over 2 GPUs .*teacher.to\('cuda:1'\)"):
                make_trainer(teacher=teacher)
            return
        trainer = make_trainer(teacher=MultiTeacher({"a": teacher, "b": build("llama", 2)}))
        assert (trainer.args.n_gpu, trainer._train_batch_size) == (1, 4)
        trainer.train()


def test_a_device_map_of_a_teacher_leaves_the_other_gpus_to_it():
    assert FrozenTeacher("org/teacher", device_map="auto").is_elsewhere(CPU)
    assert not FrozenTeacher("org/teacher").is_elsewhere(CPU)


def test_several_teachers_may_be_on_different_devices(make_trainer):
    expected = logs_of(make_trainer, MultiTeacher({"a": teacher_model(), "b": build("llama", 2)}), folder="one")
    with second_device():
        teachers = MultiTeacher({"a": teacher_model().to(SECOND), "b": build("llama", 2)})
        assert_close(logs_of(make_trainer, teachers), expected)


def test_a_materialized_teacher_elsewhere_sends_the_logits_of_the_target_tokens():
    class Head(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 0.5

    student, batch, losses = build("llama", 0), collate(rows("llama", 4)), []
    with second_device():
        for device in (CPU, SECOND):
            model = teacher_model()
            head = Head(48, 101, bias=False)
            head.load_state_dict(model.lm_head.state_dict())
            model.lm_head = head
            teacher = FrozenTeacher(model.to(device))
            teacher.prepare(student, CPU)
            losses.append(Distiller(objective(0.5, 2.0))(student, teacher, batch).loss)
    torch.testing.assert_close(*losses)


def moves_of(model, monkeypatch):
    moves = []
    monkeypatch.setattr(model, "to", lambda *args, **kwargs: moves.append(args) or model)
    return moves


def test_a_teacher_on_the_cpu_is_moved_and_one_elsewhere_or_with_a_device_map_stays(monkeypatch):
    cuda, model = torch.device("cuda", 0), build("llama", 1)
    moves = moves_of(model, monkeypatch)
    TeacherLoader().dispatch(model, cuda)
    assert moves == [(cuda,)]
    model.hf_device_map = {"": "cpu"}
    TeacherLoader().dispatch(model, cuda)
    assert len(moves) == 1
    with second_device():
        placed = build("llama", 1).to(SECOND)
        moves = moves_of(placed, monkeypatch)
        TeacherLoader().dispatch(placed, cuda)
    assert moves == []


def test_a_teacher_without_values_is_refused(make_trainer):
    with torch.device("meta"):
        teacher = build("llama", 1)
    with pytest.raises(DistillError, match=r"no values for 21 parameters .*load it with from_pretrained"):
        make_trainer(teacher=teacher, use_cpu=True)


def on_devices(monkeypatch, *devices):
    monkeypatch.setattr("hf_distill.teachers.loading.devices_of", lambda model: [torch.device(d) for d in devices])


def test_a_teacher_on_the_device_of_another_process_is_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for devices in (["cuda:0"], ["cuda:1", "cuda:3"]):
        on_devices(monkeypatch, *devices)
        with pytest.raises(DistillError, match=r"on which another process .* trains on cuda:1. Leave the teacher on"):
            TeacherLoader().dispatch(build("llama", 1), torch.device("cuda", 1))
    for devices in (["cuda:1"], ["cuda:5"], ["cpu"]):
        on_devices(monkeypatch, *devices)
        model = build("llama", 1)
        moves_of(model, monkeypatch)
        TeacherLoader().dispatch(model, torch.device("cuda", 1))


@pytest.mark.parametrize("options", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_a_tensor_parallel_teacher_is_refused(options):
    with pytest.raises(DistillError, match=rf"{next(iter(options))}: tensor parallelism .* fsdp=True or deepspeed"):
        FrozenTeacher("org/teacher", **options)
    model = build("llama", 1)
    model._tp_size = 2
    with pytest.raises(DistillError, match="divided over processes: tensor parallelism divides the output head"):
        FrozenTeacher(model).prepare(build("llama", 0), CPU)


@pytest.mark.parametrize("divided", ["student", "teacher"])
def test_a_model_whose_head_its_user_divided_is_refused(make_trainer, mesh, divided):
    models = {"student": build("llama", 0), "teacher": build("llama", 1)}
    parallelize_module(models[divided], mesh, {"lm_head": ColwiseParallel()})
    with pytest.raises(DistillError, match=f"divides the output head of the {divided}"):
        make_trainer(model=models["student"], teacher=models["teacher"], use_cpu=True)


class TensorParallelTrainer(DistillTrainer):
    """A trainer whose accelerator was configured with tensor parallelism."""

    def get_tp_size(self):
        return 2


def test_a_tensor_parallel_student_is_refused(make_trainer):
    with pytest.raises(DistillError, match=r"tensor parallelism .* divides the output head of the student"):
        make_trainer(cls=TensorParallelTrainer, teacher=build("llama", 1), use_cpu=True)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_student_spread_by_a_device_map_is_refused(make_trainer, with_adapters):
    student = build("llama", 0)
    student.hf_device_map = {"model": 0, "lm_head": 1}
    if with_adapters:
        from peft import LoraConfig, get_peft_model

        student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(DistillError, match=r"device_map of the student spreads it over 0, 1.*fsdp=True or deepspeed"):
        make_trainer(model=student, use_cpu=True)
    make_trainer(model=student, use_cpu=True, teacher=None, alpha=0.0)  # a Trainer without a teacher accepts it


def test_a_student_on_another_device_than_the_trainers_is_refused(make_trainer):
    student = build("llama", 0)
    student.hf_device_map = {"": "meta"}
    with pytest.raises(DistillError, match=r"places it on meta, but the Trainer trains on cpu. Load the student"):
        make_trainer(model=student, use_cpu=True)
