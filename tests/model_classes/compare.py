"""Compares one class of transformers with a plain reference: loss and all gradients of one training step.

The reference is the model's forward with materialized logits, and the KL (times T^2) and cross entropy of torch.
"""

import contextlib
import copy
import inspect
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import ModelOutput

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.errors import DistillError

from . import inputs as made
from .shrink import shrunk
from .table import CANNOT, CONFIGS

TEMPERATURE, ALPHA = 2.0, 0.5
SCALES = {"small": 0.3, "large": 10.0}  # standard deviations of logits over the vocabulary
LOSS_TOLERANCE = 1e-4  # relative; float32 through a few layers differs by 1e-6
GRADIENT_TOLERANCE = 1e-3  # relative to the gradient's norm; of a hundred classes, the worst differs by 2e-5


class CannotBuildError(Exception):
    """A tiny model of the class cannot be built or run."""


def overrides_of(cls: type[PreTrainedModel]) -> dict:
    """Return the overrides of `table.py` for the config of a class."""
    return CONFIGS.get(cls.__name__, {})


def build(cls: type[PreTrainedModel], seed: int) -> PreTrainedModel:
    """Build a tiny model of a class, without parameters that are zero or constant."""
    config = shrunk(cls.config_class(), overrides=overrides_of(cls))
    set_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or (
                name not in dict(model.named_parameters()) and "logits_bias" not in name
            ):
                continue
            if tensor.numel() and not tensor.abs().max() < 1e4:  # uninitialized or not finite
                tensor.normal_(0, 0.1)
            tensor.add_(torch.randn_like(tensor), alpha=0.1 if tensor.dim() < 2 else 0.02)
    return model.train()


@dataclass
class Pair:
    """The result of one step of one student with one teacher."""

    student: str
    teacher: str
    scale: str
    padded: bool
    status: str = "compared"
    reason: str = ""
    loss: float | None = None
    expected: float | None = None
    gradient: float | None = None  # largest relative difference of a parameter's gradient
    notes: list[str] = field(default_factory=list)


def logits_of(model: PreTrainedModel, batch: dict, labels: bool) -> ModelOutput:
    """Return the outputs of the model's forward for the inputs of the batch that it accepts.

    Raises:
        CannotBuildError: the forward fails.
        AttributeError: its outputs have no logits.
    """
    named = inspect.signature(model.forward).parameters
    read = {k: v.clone() for k, v in batch.items() if k in named and (labels or k != "labels")}
    if "use_cache" in named:
        read["use_cache"] = False
    try:
        outputs = model(**read, return_dict=True)
    except Exception as error:
        raise CannotBuildError(f"its own forward fails: {_describe(error)}") from error
    if not isinstance(outputs.get("logits"), torch.Tensor):
        raise AttributeError(f"the outputs have no logits, only {[*outputs]}")
    return outputs


def logits_and_labels(logits: torch.Tensor, labels: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [T, V] and labels [T] of the target tokens."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = labels.flatten() != -100
    return logits.flatten(0, labels.dim() - 1)[rows], labels.flatten()[rows]


def shift_of(model: PreTrainedModel, batch: dict) -> bool | None:
    """Return whether the model's loss shifts labels; None if it is neither cross entropy, or could be both.

    Args:
        model: a model with large logits, for which the two differ.
        batch: a batch with labels.
    """
    try:
        with torch.no_grad(), restored_buffers(model):
            set_seed(0)
            outputs = logits_of(model, batch, labels=True)
    except (CannotBuildError, AttributeError):  # the comparison reports labels of another shape
        return None
    loss, labels = outputs.get("loss"), batch["labels"]
    if loss is None or outputs.logits.shape[:-1] != labels.shape:
        return None
    plain = {
        shift: float(
            (loss - F.cross_entropy(*logits_and_labels(outputs.logits.float(), labels, shift))).abs() / loss.abs()
        )
        for shift in ((True, False) if labels.dim() > 1 else (False,))
    }
    close = 2e-2 if adds_router_loss(model) else 1e-4  # a router's loss has a small weight
    nearest = min(plain, key=plain.get)
    others = [difference for shift, difference in plain.items() if shift != nearest]
    return nearest if plain[nearest] < close and not any(x < 5 * plain[nearest] for x in others) else None


def adds_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model adds the auxiliary loss of its router."""
    parts = [model.config, *[v for v in vars(model.config).values() if isinstance(v, PreTrainedConfig)]]
    return any(getattr(part, "output_router_logits", False) for part in parts)


@contextlib.contextmanager
def restored_buffers(*models: nn.Module):
    """Restore buffers that a forward in training mode changes, such as running means."""
    before = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def reference(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict, shift: bool, decodes: bool):
    """Return the objective, and its gradient by parameter name."""
    student.train()
    teacher.eval()
    student.zero_grad(set_to_none=True)
    set_seed(0)
    outputs = logits_of(student, batch, labels=decodes)
    with torch.no_grad():
        teacher_logits = _exact(logits_of(teacher, batch, labels=decodes).logits)
    student_logits, labels = logits_and_labels(_exact(outputs.logits), batch["labels"], shift)
    teacher_logits, _ = logits_and_labels(teacher_logits, batch["labels"], shift)
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    soft = F.kl_div(
        F.log_softmax(student_logits[:, :size] / TEMPERATURE, -1),
        F.log_softmax(teacher_logits[:, :size] / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    loss = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(student_logits, labels)
    if adds_router_loss(student):
        set_seed(0)
        outputs = logits_of(student, batch, labels=True)
        loss = loss + outputs.loss - F.cross_entropy(*logits_and_labels(_exact(outputs.logits), batch["labels"], shift))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return loss.detach(), gradients


class _Recorder(TrainerCallback):
    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class _Trainer(DistillTrainer):
    """Uses rows in their order, and stores the loss of the step."""

    step_loss: Any = None

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        set_seed(0)
        loss = super().compute_loss(*args, **kwargs)
        self.step_loss = loss.detach()
        return loss


def trained(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict):
    """Return loss and gradients of one step of `DistillTrainer`."""
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder,
            max_steps=1,
            per_device_train_batch_size=len(rows),
            learning_rate=0.0,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            temperature=TEMPERATURE,
            alpha=ALPHA,
        )
        trainer = _Trainer(
            model=student, args=args, teacher=teacher, train_dataset=rows, data_collator=_stack, callbacks=[recorder]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    student.zero_grad(set_to_none=True)
    return trainer.step_loss, recorder.gradients


def _stack(rows: list[dict]) -> dict:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def scale_logits(model: PreTrainedModel, batch: dict, deviation: float, decodes: bool) -> bool:
    """Scale the output head until rows of logits have about this standard deviation; return False without a head."""
    candidates: list[tuple[nn.Module, int]] = []

    def record(module, _args, output):
        if isinstance(output, torch.Tensor) and isinstance(getattr(module, "weight", None), torch.Tensor):
            candidates.append((module, output.shape[-1]))

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with torch.no_grad(), restored_buffers(model):
            logits = logits_of(model, batch, labels=decodes).logits
    except AttributeError:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    heads = [module for module, width in candidates if width == logits.shape[-1] and module.weight.dim() >= 2]
    if not heads:
        return False
    total = 1.0
    with torch.no_grad(), restored_buffers(model):
        for _ in range(3):
            spread = logits_of(model, batch, labels=decodes).logits.float().std(-1).mean()
            if not spread.isfinite() or spread == 0:
                break
            factor = float((deviation / spread).clamp(1e-3 / total, 1e2 / total))
            heads[-1].weight.mul_(factor)
            total *= factor
            if 0.8 < factor < 1.25:
                break
    return True


def compare(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict, pair: Pair, kind: made.Kind) -> Pair:
    """Run the reference and the Trainer, and set the result of the pair."""
    problem, copies = "", _copies(student, teacher)
    try:
        with restored_buffers(student, teacher):
            expected, gradients = reference(student, teacher, batch, kind.shift, kind.decodes)
        if not expected.isfinite():
            raise CannotBuildError("the reference is not finite")
    except CannotBuildError:
        raise
    except Exception as error:  # for example outputs without logits, which must be refused
        problem = f"there is no reference ({_describe(error)}), but the Trainer trains it"
    try:
        with restored_buffers(student, teacher):
            loss, trainer_gradients = trained(student, teacher, batch)
    except DistillError as error:
        pair.status, pair.reason = "refused", str(error)
        return pair
    except Exception as error:
        pair.status, pair.reason = "crash", _describe(error)
        return pair
    finally:
        student.zero_grad(set_to_none=True)
    if problem:
        pair.status, pair.reason = "wrong", problem
        return pair
    pair.status, pair.reason = _verdict(pair, loss, trainer_gradients, expected, gradients)
    if pair.status == "wrong" and copies is not None and _equal_in_float64(*copies, batch, kind):
        pair.status, pair.reason = "compared", f"equal in float64; in float32 rounding is amplified: {pair.reason}"
    return pair


def _verdict(
    pair: Pair, loss: torch.Tensor, trainer_gradients: dict, expected: torch.Tensor, gradients: dict
) -> tuple[str, str]:
    """Return the status of a pair and its reason, and set its numbers."""
    pair.loss, pair.expected = float(loss), float(expected)
    problems = []
    if abs(pair.loss - pair.expected) > LOSS_TOLERANCE * max(abs(pair.expected), 1e-2):
        problems.append(f"the loss is {pair.loss:.6g} instead of {pair.expected:.6g}")
    worst, pair.gradient = _worst(trainer_gradients, gradients)
    if not pair.gradient <= GRADIENT_TOLERANCE:
        problems.append(f"the gradient of {worst} differs by {pair.gradient:.3g} of its norm")
    return ("wrong" if problems else "compared"), "; ".join(problems)


def _copies(*models: PreTrainedModel) -> tuple[PreTrainedModel, ...] | None:
    """Return copies of models; None if they cannot be copied."""
    try:
        return tuple(copy.deepcopy(model) for model in models)
    except (RuntimeError, TypeError):
        return None


def _equal_in_float64(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict, kind: made.Kind) -> bool:
    """Whether loss and gradients agree in float64, for models that were not trained."""
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    try:
        student.double()
        teacher.double()
        with restored_buffers(student, teacher):
            expected, gradients = reference(student, teacher, batch, kind.shift, kind.decodes)
        with restored_buffers(student, teacher):
            loss, trainer_gradients = trained(student, teacher, batch)
    except Exception:  # many classes compute parts in float32 regardless of their dtype
        return False
    return _verdict(Pair("", "", "", False), loss, trainer_gradients, expected, gradients)[0] == "compared"


def _worst(gradients: dict, expected: dict) -> tuple[str, float]:
    """Return the parameter whose gradient differs most, relative to its norm or to a thousandth of the largest norm."""
    largest = max([float(g.norm()) for g in expected.values()], default=0.0)
    worst, most = "", 0.0
    for name in {**gradients, **expected}:
        one, other = gradients.get(name), expected.get(name)
        one = torch.zeros_like(other) if one is None else one
        other = torch.zeros_like(one) if other is None else other
        difference = float((one.float() - other.float()).norm()) / max(float(other.norm()), 1e-3 * largest, 1e-8)
        if not difference <= most:
            worst, most = name, difference
    return worst, most


def _describe(error: BaseException) -> str:
    """Return an error as text, with the file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    package_frames = [f for f in traceback.extract_tb(error.__traceback__) if "/hf_distill/" in f.filename]
    location = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
    if package_frames:
        location += f" by {package_frames[-1].filename.rsplit('/', 1)[-1]}:{package_frames[-1].lineno}"
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} [{location}]"


def compare_class(cls: type[PreTrainedModel], partners: dict) -> dict:
    """Compare all pairs of a class; its status is the worst status of its pairs."""
    start = time.monotonic()
    result: dict[str, Any] = {"class": cls.__name__, "status": "", "reason": "", "pairs": []}
    if cls.__name__ in CANNOT:
        return {**result, "status": "cannot", "reason": CANNOT[cls.__name__]}
    try:
        pairs = _pairs(cls, partners, result)
    except Exception as error:
        reason = str(error) if isinstance(error, CannotBuildError) else _describe(error)
        result.update(status="cannot", reason=reason, pairs=[])
    else:
        for status in ("wrong", "crash", "compared", "refused"):
            matching = [pair for pair in pairs if pair.status == status]
            if matching:
                first = matching[0]
                reason = first.reason and f"{first.reason} ({first.student} <- {first.teacher}, {first.scale}, " + (
                    "padded)" if first.padded else "not padded)"
                )
                result.update(status=status, reason=first.reason if status == "refused" else reason)
                break
        result["pairs"] = [{k: v for k, v in vars(pair).items() if v not in (None, "", [])} for pair in pairs]
    result["seconds"] = round(time.monotonic() - start, 2)
    return result


def _pairs(cls: type[PreTrainedModel], partners: dict, result: dict) -> list[Pair]:
    compared = ComparedClass.of(cls, partners)
    kind = compared.kind
    result["kind"] = f"{kind.name}, {kind.modality}, labels {'shifted' if kind.shift else 'not shifted'}"
    if not compared.is_shift_measured:
        result["notes"] = ["its own loss is no plain cross entropy, so the shift of its labels is assumed"]
    paddings = (False, True) if kind.text else (False,)
    pairs = [compared.pair("same", scale, padded) for scale in SCALES for padded in paddings]
    if kind.partner(cls) is not None:
        for role in ("student", "teacher"):
            try:
                pairs.append(compared.pair(role, "large", kind.text))
            except CannotBuildError:  # the two read different inputs
                result.setdefault("notes", []).append(f"not compared as {role} with {kind.partner(cls).__name__}")
    return pairs


@dataclass
class ComparedClass:
    """Two models of a class, and what it reads and predicts.

    is_shift_measured: whether its loss shows if labels are shifted
    """

    one: PreTrainedModel
    two: PreTrainedModel
    kind: made.Kind
    is_shift_measured: bool
    partners: dict

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], partners: dict) -> "ComparedClass":
        """Build both models.

        Args:
            model_class: the class.
            partners: class -> two models of it; models of partner classes are added.
        """
        one = build(model_class, 0)
        kind = made.reference_kind(one)
        batch = made.batch_for(one, kind, False)
        scale_logits(one, batch, SCALES["large"], kind.decodes)
        shift = shift_of(one, batch)
        kind = kind if shift is None else replace(kind, shift=shift)
        return cls(one, build(model_class, 1), kind, shift is not None or kind.name == "sequence", partners)

    def pair(self, role: str, scale: str, padded: bool) -> Pair:
        """Compare one step.

        Args:
            role: "same": both models are of the class; "student" or "teacher": the other is of its partner.
            scale: "small" or "large" logits.
            padded: whether matching rows are shorter than others.
        """
        kind, student, teacher = self.kind, self.one, self.two
        if role != "same":
            partner = kind.partner(type(self.one))
            if partner not in self.partners:
                self.partners[partner] = (build(partner, 2), build(partner, 3))
            student, teacher = (
                (student, self.partners[partner][1]) if role == "student" else (self.partners[partner][0], teacher)
            )
        batch = made.batch_for(self.one, kind, padded)
        for model in (student, teacher):
            scale_logits(model, batch, SCALES[scale], kind.decodes)
        if role == "teacher" and scale == "large":
            kind = replace(kind, shift=bool(shift_of(student, batch)))
        return compare(
            student, teacher, batch, Pair(type(student).__name__, type(teacher).__name__, scale, padded), kind
        )
