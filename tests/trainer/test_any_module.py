"""Students and teachers that are no transformers models: `model_type=` says what their outputs are."""

import copy
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, collate, one_step, rows
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import Trainer, set_seed

from hf_distill import DistillError, RowOutputs, loss, register_model_type
from hf_distill.losses import LOSSES
from hf_distill.models import model_types, type_catalog
from hf_distill.models.output_head import known_output_head
from hf_distill.teachers import (
    AdapterBaseTeacher,
    EMATeacher,
    MTPTeacher,
    MultiViewTeacher,
    PeerTeacher,
    SnapshotTeacher,
)

CLASSES, VOCAB = 4, 97
Outputs = namedtuple("Outputs", ["logits", "hidden"])
HARD = {
    "classification": cross_entropy,
    "token_classification": lambda z, y: cross_entropy(z.flatten(0, 1), y.flatten()),
    "multi_label_classification": binary_cross_entropy_with_logits,
    "regression": mse_loss,
}
FORMS = {  # what a forward returns, from its logits and loss
    "dict": lambda z, loss: {"logits": z} if loss is None else {"loss": loss, "logits": z},
    "tuple": lambda z, loss: (z, z + 1) if loss is None else (loss, z),
    "object": lambda z, loss: SimpleNamespace(loss=loss, logits=z),
    "namedtuple": lambda z, loss: Outputs(z, z),
    "tensor": lambda z, loss: z,
}


class Net(nn.Module):
    """A classifier of vectors, or of each vector of a row."""

    def __init__(self, seed=0, width=16, outputs=CLASSES, form="dict", task="classification", dropout=0.0):
        super().__init__()
        set_seed(seed)
        self.inner = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.BatchNorm1d(width))
        self.fc = nn.Linear(width, outputs)
        self.form, self.task = form, task

    def forward(self, x, labels=None):
        hidden = self.inner(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        logits = self.fc(hidden)
        return FORMS[self.form](logits, None if labels is None else HARD[self.task](logits, labels))


def net(task="classification", seed=0, **options):
    return Net(seed, outputs=1 if task == "regression" else CLASSES, task=task, **options).eval()


def data(task="classification", n=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 6) if task == "token_classification" else (6,)
    labels = {
        "classification": lambda: torch.randint(0, CLASSES, (), generator=generator),
        "token_classification": lambda: torch.randint(0, CLASSES, (5,), generator=generator),
        "multi_label_classification": lambda: torch.randint(0, 2, (CLASSES,), generator=generator).float(),
        "regression": lambda: torch.randn(1, generator=generator),
    }[task]
    return [{"x": torch.randn(shape, generator=generator), "labels": labels()} for _ in range(n)]


def stack(batch):
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


@pytest.fixture
def modules(make_trainer):
    """`modules("regression", alpha=0.3)`: a trainer of two tiny modules."""

    def make(task="classification", **options):
        arguments = {
            "model": net(task), "train_dataset": data(task), "eval_dataset": data(task, 7, 5), "data_collator": stack
        } | options  # fmt: skip
        if "cls" not in options:
            arguments = {"teacher": net(task, 1, width=24), "model_type": task} | arguments
        return make_trainer(**arguments)

    return make


def soft(task, z, y, temperature):
    if task == "regression":
        return (z - y).square().mean()
    if task == "multi_label_classification":
        z, y = (torch.stack([v, torch.zeros_like(v)], -1) for v in (z, y))
    z, y = ((v / temperature).log_softmax(-1) for v in (z, y))
    kl = (y.exp() * (y - z)).sum(-1)
    return temperature**2 * (kl.sum(-1) if task == "multi_label_classification" else kl).mean()


def reference(task, student, teacher, batch, alpha=0.3, temperature=2.0):
    z = logits_of(student(batch["x"]))
    y = logits_of(teacher(batch["x"])).detach()
    return alpha * soft(task, z, y, temperature) + (1 - alpha) * HARD[task](z, batch["labels"])


def logits_of(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None) or outputs[0]


def frozen_statistics(model):
    """Let the batch norms keep their statistics, so that a batch may be divided."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.train = lambda mode=True: part  # noqa: B023
    return model


@pytest.mark.parametrize("pieces", [(4, 2), (1, 8)])
@pytest.mark.parametrize("task", list(HARD))
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(modules, task, pieces):
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential")
    if task == "regression":
        options.pop("temperature")

    def make(*args, **more):
        return modules(task, model=frozen_statistics(net(task)), **more)

    log, gradient = one_step(make, task, *pieces, **options)
    student, teacher = net(task), net(task, 1, width=24)
    total = reference(task, student, teacher, stack(data(task)[:8]))
    total.backward()
    assert log["loss"] == pytest.approx(total.item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", list(FORMS))
def test_logits_are_read_from_every_form_of_outputs(modules, form):
    metrics = modules(model=net(form=form), teacher=net(seed=1, form=form)).evaluate()
    batch = stack(data(n=7, seed=5))
    expected = reference("classification", net(), net(seed=1), batch, alpha=0.5)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= metrics["eval_agreement"] <= 1


@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(modules, options):
    steps = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = modules(model=net(dropout=0.1), **steps, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


def test_it_is_saved_as_the_trainer_saves_it_and_training_resumes(modules, tmp_path):
    options = dict(max_steps=4, save_steps=2, save_strategy="steps")
    whole = modules(folder="whole", model=net(dropout=0.1), **options)
    whole.train()
    resumed = modules(folder="resumed", model=net(dropout=0.1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = whole.model.state_dict()
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in state.items())
    whole.save_model(str(tmp_path / "saved"))
    files = load_file(tmp_path / "saved" / "model.safetensors")
    assert files.keys() == state.keys()
    again = net(seed=7)
    again.load_state_dict(files)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    whole.create_model_card()
    assert "distillation" in (tmp_path / "whole" / "README.md").read_text()


def test_a_teacher_is_frozen_and_a_student_may_be_its_teacher_later(modules):
    teacher = net(seed=1).train()
    trainer = modules(teacher=teacher)
    trainer.train()
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, net(seed=1).state_dict()[name]) for name, value in teacher.state_dict().items())
    modules("multi_label_classification", teacher=trainer.model).evaluate()


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: EMATeacher(), lambda: SnapshotTeacher(interval_steps=2), lambda: PeerTeacher(net(seed=1), mutual=True),
        lambda: {"a": net(seed=1), "b": net(seed=2, width=8)},
    ],
    ids=["ema", "snapshot", "mutual", "several"],
)  # fmt: skip
def test_other_teachers_of_a_module_train(modules, teacher):
    trainer = modules(teacher=teacher())
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.tensor(log["loss"]).isfinite() for log in trainer.state.log_history if "loss" in log)
    assert not torch.equal(before["fc.weight"], trainer.model.state_dict()["fc.weight"])


def test_a_peer_and_a_snapshot_are_saved_and_read_as_state_dicts(modules, tmp_path):
    peer = PeerTeacher(net(seed=1))
    modules(teacher=peer).train()
    peer.save_pretrained(tmp_path / "peer")
    saved = load_file(tmp_path / "peer" / "model.safetensors")
    assert all(torch.equal(value, peer.model.state_dict()[name]) for name, value in saved.items())
    student = net()
    metrics = modules(model=student, teacher=SnapshotTeacher(path=str(tmp_path / "peer"))).evaluate()
    student, teacher = net(), net()
    teacher.load_state_dict(saved)
    expected = reference("classification", student, teacher, stack(data(n=7, seed=5)), alpha=0.5)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


class Around(nn.Module):
    """A wrapper around a transformers model, which returns a tuple."""

    def __init__(self, model, change=lambda logits: logits):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, input_ids, attention_mask=None):
        return (self.change(self.model(input_ids=input_ids, attention_mask=attention_mask).logits),)


@pytest.mark.parametrize("kind", ["llama", "bert", "sequence", "token"])
def test_a_wrapper_trains_as_the_model_inside_it(make_trainer, kind):
    names = {"llama": "causal_lm", "bert": "masked_lm", "sequence": "classification", "token": "token_classification"}
    losses = [{"name": "hidden_mse"}]
    results = []
    for wrap in (lambda model: model, Around):
        given = {} if wrap is not Around else {"model_type": names[kind]}
        trainer = make_trainer(kind, model=wrap(build(kind, 0)), teacher=wrap(build(kind, 1)), losses=losses, **given)
        trainer.train()
        results.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    head = known_output_head(trainer.model)
    assert (head.scaling is not None) == (kind in ("llama", "bert"))


@pytest.mark.parametrize(
    ("change", "is_fused"),
    [(lambda z: z, True), (lambda z: 2 * z, False), (lambda z: z.view(len(z), -1, VOCAB), False)],
    ids=["plain", "scaled", "reshaped"],
)
def test_the_output_head_is_found_by_measurement_or_logits_are_dense(make_trainer, change, is_fused):
    trainer = make_trainer(model=Around(build("llama", 0), change), model_type="causal_lm", alpha=0.3)
    trainer.train()
    assert (known_output_head(trainer.model).scaling is not None) == is_fused
    fields = ("input_ids", "attention_mask")
    batch = collate(rows("llama", 7, seed=5))
    inputs = {name: batch[name] for name in fields if name in batch}
    with torch.no_grad():
        z, y = trainer.model(**inputs)[0][:, :-1], build("llama", 1, layers=3, width=48).eval()(**inputs).logits[:, :-1]
    keep = batch["labels"][:, 1:] != -100
    z, y, labels = z[keep], y[keep], batch["labels"][:, 1:][keep]
    expected = 0.3 * soft("classification", z, y, 2.0) + 0.7 * cross_entropy(z, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_adapters_of_a_module_train(modules):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(net(), LoraConfig(target_modules=["inner.0"]))
    trainer = modules(model=model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("lora_" in name for name in changed)
    assert not any("fc.weight" in name for name in changed)


def test_a_step_that_is_not_finite_is_skipped(modules):
    rows_with_nan = [{"x": torch.full((6,), torch.nan), "labels": torch.tensor(0)}] * 4
    trainer = modules(train_dataset=rows_with_nan, max_steps=1, model=frozen_statistics(net()))
    trainer.train()
    assert all(torch.equal(value, net().state_dict()[name]) for name, value in trainer.model.state_dict().items())


def test_model_init_makes_modules_of_the_type(modules):
    trainer = modules(model=None, model_init=lambda: net(seed=3))
    trainer.train()
    assert trainer.evaluate()["eval_kl"] >= 0


TOO_LARGE = [{"x": torch.zeros(6), "labels": torch.tensor(3)}] * 4


class Needs(nn.Linear):
    def forward(self, x, labels):
        return super().forward(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_type": None},
            "Net cannot be distilled without `model_type`: Net is not a class of transformers.*token_classif",
        ),
        ({"model_type": "clasification"}, "model_type is 'clasification'.*classification.*register_model_type"),
        ({"model": Needs(6, 4)}, "Needs.forward requires labels"),
        ({"teacher": net(seed=1, form="dict", width=8).fc}, "Linear.forward requires input, and the batch has"),
        ({"teacher": "llama"}, "The teacher is a causal language model and the student a sequence classifier"),
        ({"teacher": Net(1, outputs=3)}, "logits of 3 classes and the student of 4"),
        (
            {"model": Net(0, outputs=3), "teacher": Net(1, outputs=3), "train_dataset": TOO_LARGE},
            "outside the student's 3 classes",
        ),
        ({"losses": [{"name": "hidden_mse"}]}, "num_hidden_layers=..., hidden_size=..."),
        ({"torch_compile": True}, "num_hidden_layers=..., hidden_size=..."),
        ({"divergence": "mse"}, "mse is for real values"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(modules, options, message):
    if options.get("teacher") == "llama":
        options = {"teacher": build("llama", 1)}
    with pytest.raises(DistillError, match=message):
        modules(**options, max_steps=1).train()


def test_the_model_inside_a_wrapper_is_named_in_the_error(make_trainer):
    with pytest.raises(DistillError, match="`model` is a LlamaForCausalLM, a causal language model"):
        make_trainer(model=Around(build("llama", 0)))


class Blocks(nn.Module):
    """A module that describes its blocks."""

    def __init__(self, seed, width):
        super().__init__()
        from transformers import PretrainedConfig

        set_seed(seed)
        self.config = PretrainedConfig(num_hidden_layers=2, hidden_size=width)
        self.first, self.fc = nn.Linear(6, width), nn.Linear(width, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.fc(hidden)


def test_features_of_a_module_that_describes_its_blocks(modules):
    task = "token_classification"
    losses = [{"name": "hidden_mse"}]
    trainer = modules(task, model=Blocks(0, 16), teacher=Blocks(1, 16), losses=losses)
    metrics = trainer.evaluate()
    x, hidden = stack(data(task, 7, 5))["x"], []
    for seed in (0, 1):
        model = Blocks(seed, 16)
        first = model.blocks[0](model.first(x))
        hidden.append((first, model.blocks[1](first)))
    expected = torch.stack([(s - t).square().mean() for s, t in zip(*hidden, strict=True)]).mean()
    assert metrics["eval_hidden_mse_loss"] == pytest.approx(expected.item(), rel=1e-5)


class Thresholds(RowOutputs):
    """Ordinal regression: the logits are those of `label > 0`, `label > 1`, ..."""

    outputs, soft_loss, hard_loss = "thresholds", "threshold_kl", "threshold_cross_entropy"
    pair_metrics = ("rank_error",)

    def row_labels(self, inputs):
        return inputs["labels"]

    def check_labels(self, targets, num_outputs):
        if targets.labels.max() > num_outputs:
            raise DistillError(f"labels above {num_outputs}")

    def metrics(self, student, block, targets):
        if block is None:
            return {}
        return {"rank_error": ((block.student > 0).sum(-1) - (block.teacher > 0).sum(-1)).abs().float()}


def is_above(labels, logits):
    return (labels[:, None] > torch.arange(logits.shape[1])).to(logits)


def threshold_kl(student, teacher, targets, *, temperature=1.0):
    s, t = (signals.logits.values / temperature for signals in (student, teacher))
    return binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none").sum(-1)


def threshold_cross_entropy(student, teacher, targets):
    z = student.logits.values
    return binary_cross_entropy_with_logits(z, is_above(targets.labels, z), reduction="none").mean(-1)


class TwoHeads(RowOutputs):
    """Two classifiers in one module: of 4 and of 3 classes."""

    outputs, soft_loss, hard_loss = "two_heads", "two_heads_kl", "two_heads_cross_entropy"
    label_names, logit_names = ("first_label", "second_label"), ("first", "second")

    def logits_of(self, outputs):
        return torch.cat([outputs[name] for name in self.logit_names], -1)

    def row_labels(self, inputs):
        return torch.stack([inputs[name] for name in self.label_names], -1)


def two_heads_kl(student, teacher, targets, *, temperature=1.0):
    parts = (signals.logits.values.split([4, 3], -1) for signals in (student, teacher))
    return sum(kl_of(s / temperature, t / temperature) for s, t in zip(*parts, strict=True))


def two_heads_cross_entropy(student, teacher, targets):
    parts = zip(student.logits.values.split([4, 3], -1), targets.labels.unbind(-1), strict=True)
    return sum(cross_entropy(z, y, reduction="none") for z, y in parts)


def kl_of(s, t):
    return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)


class TwoHeadNet(nn.Module):
    def __init__(self, seed):
        super().__init__()
        set_seed(seed)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        return {"first": self.first(x), "second": self.second(x)}


@pytest.fixture
def custom_types():
    """The types "thresholds" and "two_heads" and their losses, until the end of the test."""
    types, losses = dict(type_catalog.TYPE_BY_NAME), dict(LOSSES)
    loss("threshold_kl", outputs="thresholds")(threshold_kl)
    loss("threshold_cross_entropy", compares=(), outputs="thresholds")(threshold_cross_entropy)
    loss("two_heads_kl", outputs="two_heads")(two_heads_kl)
    loss("two_heads_cross_entropy", compares=(), outputs="two_heads")(two_heads_cross_entropy)
    register_model_type("thresholds", Thresholds())
    register_model_type("two_heads", TwoHeads())
    yield
    for registry, before in ((type_catalog.TYPE_BY_NAME, types), (LOSSES, losses)):
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("pieces", [(4, 2), (2, 4)])
def test_a_registered_type_trains_with_its_losses_labels_and_metrics(modules, custom_types, pieces):
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential", model_type="thresholds")

    def make(*args, **more):
        return modules(model=frozen_statistics(net()), **more)

    log, gradient = one_step(make, "thresholds", *pieces, **options)
    student, teacher, batch = net(), net(seed=1, width=24), stack(data()[:8])
    z, y = student(batch["x"])["logits"], teacher(batch["x"])["logits"].detach()
    soft_loss = 4 * binary_cross_entropy_with_logits(z / 2, (y / 2).sigmoid(), reduction="none").sum(-1).mean()
    total = 0.3 * soft_loss + 0.7 * binary_cross_entropy_with_logits(z, is_above(batch["labels"], z))
    total.backward()
    assert log["loss"] == pytest.approx(total.item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-5, atol=1e-7)
    z, y = (model(stack(data(n=7, seed=5))["x"])["logits"] for model in (net(), teacher))
    expected = ((z > 0).sum(-1) - (y > 0).sum(-1)).abs().float().mean()
    metrics = modules(model_type="thresholds").evaluate()
    assert metrics["eval_rank_error"] == pytest.approx(expected.item())


def test_several_heads_are_one_type(modules, custom_types, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows_of_two = [
        {"x": row["x"], "first_label": row["labels"], "second_label": torch.randint(0, 3, (), generator=generator)}
        for row in data(n=7)
    ]
    seen = []
    trainer = modules(
        model=TwoHeadNet(0),
        teacher=TwoHeadNet(1),
        model_type="two_heads",
        train_dataset=rows_of_two,
        eval_dataset=rows_of_two,
        alpha=0.3,
        compute_metrics=lambda p: seen.append(p) or {},
    )
    metrics, batch = trainer.evaluate(), stack(rows_of_two)
    s, t = (TwoHeadNet(seed)(batch["x"]) for seed in (0, 1))
    soft_loss = sum(4 * kl_of(s[name] / 2, t[name] / 2).mean() for name in s)
    hard = sum(cross_entropy(s[name], batch[f"{name}_label"]) for name in s)
    assert metrics["eval_loss"] == pytest.approx((0.3 * soft_loss + 0.7 * hard).item(), rel=1e-5)
    assert [part.shape for part in seen[0].predictions] == [(7, 4), (7, 3)]
    assert [part.shape for part in seen[0].label_ids] == [(7,), (7,)]
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model = TwoHeadNet(...)" in card
    assert "library_name: pytorch" in card
    assert "pipeline_tag" not in card


def test_a_transformers_model_may_have_a_registered_type(make_trainer, custom_types):
    trainer = make_trainer("sequence", model_type="thresholds", teacher=build("sequence", 1))
    trainer.train()
    assert trainer.evaluate()["eval_rank_error"] >= 0
    make_trainer("sequence").evaluate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("my type", Thresholds()), "no name for a model type"),
        (("regression", Thresholds()), "registered already"),
        (("mine", Thresholds), "output_type is Thresholds: give an object"),
        (
            ("mine", type("Unknown", (Thresholds,), {"soft_loss": "nothing"})()),
            "soft_loss of Unknown: Unknown loss",
        ),
        (("mine", type("Other", (Thresholds,), {"hard_loss": "cross_entropy"})()), "cross_entropy is for a distr"),
    ],
)
def test_types_that_cannot_be_registered_are_refused(custom_types, arguments, message):
    with pytest.raises(DistillError, match=message):
        register_model_type(*arguments)


def test_projectors_of_a_module_are_not_saved_with_it_and_training_resumes(modules, tmp_path):
    task, options = "token_classification", dict(max_steps=4, save_steps=2, save_strategy="steps")

    def make(folder):
        teacher, losses = Blocks(1, 24), [{"name": "hidden_mse"}]
        return modules(task, model=Blocks(0, 16), teacher=teacher, losses=losses, folder=folder, **options)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    parameters = dict(whole.model.named_parameters())
    assert any("sidecar" in name for name in parameters)
    assert all(torch.equal(value, parameters[name]) for name, value in resumed.model.named_parameters())
    whole.save_model(str(tmp_path / "saved"))
    Blocks(0, 16).load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))


def test_a_module_is_pushed_with_its_card(modules, hub):
    trainer = modules(push_to_hub=True, hub_model_id="tester/net", hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    repo = hub.repos["models", "tester/net"]
    files = [files for files in repo.commits.values() if "model.safetensors" in files][-1]
    assert b"model = Net(...)" in hub.content(files["README.md"])


class WithAux(Net):
    """Returns an auxiliary loss, also without labels; its `config` is not one of transformers."""

    config = SimpleNamespace(width=16)

    def forward(self, x):
        outputs = super().forward(x)
        return outputs | {"loss": outputs["logits"].square().mean()}


@pytest.mark.parametrize("pieces", [(4, 2), (1, 8)])
def test_a_loss_that_a_module_returns_without_labels_is_added(modules, pieces):
    def make(*args, **more):
        return modules(model=frozen_statistics(WithAux().eval()), **more)

    log, gradient = one_step(make, "", *pieces, alpha=0.3, temperature=2.0, train_sampling_strategy="sequential")
    student, batch = net(), stack(data()[:8])
    total = reference("classification", student, net(seed=1, width=24), batch)
    total = total + student(batch["x"])["logits"].square().mean()
    total.backward()
    assert log["loss"] == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(gradient["fc.weight"], student.fc.weight.grad, rtol=1e-5, atol=1e-7)


class AroundSeq2Seq(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids)


def test_decoder_inputs_of_a_wrapper_are_made_by_the_model_inside(make_trainer):
    losses = []
    for wrap, given in ((lambda model: model, {}), (AroundSeq2Seq, {"model_type": "seq2seq_lm"})):
        trainer = make_trainer("t5", model=wrap(build("t5", 0)), teacher=wrap(build("t5", 1)), **given)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_blocks_of_a_model_in_a_wrapper_are_compiled(make_trainer):
    options = dict(torch_compile=True, torch_compile_backend="eager", max_steps=1)
    trainer = make_trainer(model=Around(build("llama", 0)), model_type="causal_lm", **options)
    trainer.train()
    assert trainer.model.model.model.layers[0]._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: MTPTeacher(), "Around is no transformers model, and multi-token prediction"),
        (lambda: AdapterBaseTeacher(), "adapters"),
    ],
)
def test_teachers_that_need_a_transformers_student_say_so(make_trainer, teacher, message):
    with pytest.raises(DistillError, match=message):
        make_trainer(model=Around(build("llama", 0)), model_type="causal_lm", teacher=teacher()).train()


def test_a_teacher_sees_another_view_of_a_modules_batch(make_trainer):
    trainer = make_trainer(
        model=Around(build("llama", 0)), model_type="causal_lm", teacher=MultiViewTeacher({"prepend_context_tokens": 2})
    )
    trainer.train()
    logs = [log["soft_loss"] for log in trainer.state.log_history if "soft_loss" in log]
    assert len(logs) == 4
    assert min(logs) > 0, "the teacher is the student, so only another view makes a difference"


def test_a_data_parallel_wrapper_around_a_compiled_module_has_its_type(modules):
    model = modules().model
    assert model_types.model_type_of(torch.compile(model)).name == "sequence classifier"
    assert model_types.model_type_of(copy.deepcopy(model)).output_type is type_catalog.SEQUENCE.output_type


def test_a_module_with_tied_weights_is_saved_and_resumes(make_trainer, tmp_path):
    options = dict(max_steps=4, save_steps=2, save_strategy="steps", model_type="causal_lm")
    whole, resumed = (
        make_trainer("gpt2", model=Around(build("gpt2", 0)), teacher=build("gpt2", 1), folder=folder, **options)
        for folder in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = whole.model.state_dict()
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in state.items())
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert len({"model.lm_head.weight", "model.transformer.wte.weight"} & saved.keys()) == 1


class Spans(nn.Module):
    def __init__(self, seed):
        super().__init__()
        set_seed(seed)
        self.embedding, self.fc = nn.Embedding(VOCAB, 6), nn.Linear(6, 2)

    def forward(self, input_ids):
        start, end = self.fc(self.embedding(input_ids)).unbind(-1)
        return {"start_logits": start, "end_logits": end}


def test_spans_of_a_module(modules):
    task_rows = [
        {"input_ids": torch.arange(5) + i, "start_positions": torch.tensor(i % 5), "end_positions": torch.tensor(4)}
        for i in range(7)
    ]
    options = dict(model=Spans(0), teacher=Spans(1), train_dataset=task_rows, eval_dataset=task_rows, alpha=0.3)
    trainer, batch = modules(model_type="question_answering", **options), stack(task_rows)
    total = 0.0
    for name in ("start", "end"):
        z, y = (Spans(seed)(batch["input_ids"])[f"{name}_logits"] for seed in (0, 1))
        hard = cross_entropy(z, batch[f"{name}_positions"])
        total = total + (0.3 * soft("classification", z, y, 2.0) + 0.7 * hard) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total.item(), rel=1e-5)


class OneNumber(nn.Module):
    def __init__(self, seed):
        super().__init__()
        set_seed(seed)
        self.fc = nn.Linear(6, 1)

    def forward(self, x):
        return self.fc(x)[:, 0]


def test_one_number_for_each_row_needs_no_second_dimension(modules):
    numbers = [{"x": row["x"], "labels": row["labels"][0]} for row in data("regression", 7)]
    options = dict(model=OneNumber(0), teacher=OneNumber(1), train_dataset=numbers, eval_dataset=numbers, alpha=0.3)
    trainer, batch = modules("regression", **options), stack(numbers)
    z, y = OneNumber(0)(batch["x"]), OneNumber(1)(batch["x"])
    expected = 0.3 * mse_loss(z, y) + 0.7 * mse_loss(z, batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()


class Weighted(Net):
    """Its own loss has weights of classes, which the hard loss of its type has not."""

    def __init__(self, smoothing=0.0, weight=(1.0, 2.0, 3.0, 4.0)):
        super().__init__()
        self.weight, self.smoothing = torch.tensor(weight), smoothing

    def forward(self, x, labels=None):
        logits = super().forward(x)["logits"]
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels, weight=self.weight, label_smoothing=self.smoothing)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


@pytest.mark.parametrize("options", [{}, {"weight": (1.0,) * CLASSES, "smoothing": 0.1}])
def test_a_loss_of_a_module_that_is_another_one_than_that_of_its_type_is_refused(modules, options):
    with pytest.raises(DistillError, match=r"own loss of Weighted is .* register this loss and a model type"):
        modules(model=Weighted(**options).eval(), max_steps=1).train()
