"""Forward passes whose output head computes the fused loss of the target tokens, or no logits at all.

The `forward` of the output head is replaced for the call, inside the model's own forward, so wrappers (DDP, ZeRO-3,
FSDP2) gather its weights as usual. The replacement returns the loss through the head's output: a forward hook on the
head reads it there, after the wrappers' hooks, and the model passes it on as if it were logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..losses.fused import ChunkedLoss
from ..losses.output_types import EMBEDDING_OUTPUTS
from .aux_losses import AuxLosses, labels_of, plan_aux_losses
from .feature_capture import capture_features
from .features import FeatureLoss
from .frozen_head import FrozenHead
from .model_call import named_outputs, prepare_inputs, without_made_logits
from .model_types import model_type_of, unwrap_model, unwrap_parallel
from .output_head import OutputHead, output_head, replaced_forward
from .sidecar import sidecar_of


def extract_signals(
    model: nn.Module,
    inputs: dict,
    targets: Targets,
    feature_requests: Mapping[FeatureKey, FeatureTokens],
    frozen_head: FrozenHead | None = None,
) -> Signals:
    """Run a model and return its logits and features for the target tokens, on the device of the targets.

    The logits are lazy (hidden states and the output head's weight) unless `output_head` requires materialized ones.
    Only hidden states, features and materialized logits of the target tokens are moved to the device of the targets.

    Args:
        model: a model in eval mode; the caller disables gradients.
        inputs: the collator's batch, on the device of the model's inputs.
        targets: T target tokens, on the student's device.
        feature_requests: feature key -> the N tokens whose features are captured.
        frozen_head: holds the copy of the output head of a frozen model; None: the head's weight is read each time, and
            must be on the device of the targets.
    """
    device = targets.labels.device
    inputs = prepare_inputs(unwrap_model(model), inputs)
    head = output_head(model, inputs)
    lazy: list[LazyLogits] = []

    def record_lazy(lazy_logits: LazyLogits) -> Tensor:
        lazy.append(lazy_logits.detach())
        return _placeholder_logits(lazy_logits)

    of_head = LazyLogits.of_head if frozen_head is None else partial(frozen_head.lazy_logits, device=device)
    with capture_features(model, feature_requests) as captured:
        outputs, head_output = _run(model, inputs, targets, head, record_lazy, of_head)
    features = {key: feature.to(device) for key, feature in captured.items()}
    if head_output is None:
        return Signals(DenseLogits(targets.gather_logits(outputs["logits"]).to(device)), features)
    return Signals(replace(lazy[0], hidden=lazy[0].hidden.to(device)), features)


def forward_with_loss(
    model: nn.Module,
    inputs: dict,
    chunked_loss: ChunkedLoss,
    feature_loss: FeatureLoss | None = None,
    feature_requests: Mapping[FeatureKey, FeatureTokens] = MappingProxyType({}),
    before_loss: Callable[[LazyLogits | DenseLogits], Tensor | None] = lambda _: None,
    keep_logits: bool = False,
) -> tuple[Tensor, ModelOutput]:
    """Run the student's forward and return the objective; `per_token` of the losses is set.

    Args:
        model: the student as prepared, wrappers included; with features, its sidecar is attached.
        inputs: the collator's batch.
        chunked_loss: the loss on the student's logits of the T target tokens.
        feature_loss: the loss on the student's features.
        feature_requests: feature key -> the N tokens whose features are captured in the student.
        before_loss: called in the model's forward with the student's logits, before the losses run. It may return a
            further loss, [], which is added.
        keep_logits: materialize the logits of all positions and leave them in the outputs, for metrics.

    Returns:
        (the objective over target tokens / num_items, []; the student's outputs).
    """
    targets = chunked_loss.targets
    prepared = prepare_inputs(unwrap_model(model), inputs)
    head = output_head(model, prepared)
    head_losses: list[Tensor] = []  # computed in the head of the present forward; a model may be run twice
    plan = plan_aux_losses(model, inputs, partial(_run_rows, model, targets, head), targets)
    aux, is_lazy = AuxLosses(model, inputs, plan), not (keep_logits or plan.needs_logits)
    aux_losses: list[Tensor | None] = []
    exact_losses: list[Tensor] = []  # before wrappers such as FSDP2 with bf16 cast the output of the head

    def run_fused_loss(student_logits: LazyLogits) -> Tensor:
        further_loss = before_loss(student_logits)
        loss = chunked_loss.from_hidden(student_logits)
        head_losses.append(loss if further_loss is None else loss + further_loss)
        exact_losses.append(head_losses[-1].detach())
        # The head returns the loss in the shape of logits. FSDP2 warns about views, whose hooks can be lost.
        return head_losses[-1].reshape(1, 1, 1).clone()

    def add_remaining_losses(outputs: ModelOutput) -> ModelOutput:
        """Add the losses that the head did not return to the model's `loss`, where DDP finds their graph."""
        summands: list[Tensor] = []
        if not head_losses:
            further_loss = before_loss(DenseLogits(targets.gather_logits(outputs["logits"])))
            summands += [] if further_loss is None else [further_loss]
        head_losses.clear()
        aux_losses.append(aux.of(outputs))
        if aux_losses[-1] is not None:  # weighted with this batch's share of the target tokens of the global batch
            divisor = targets.divisor(chunked_loss.num_items).to(aux_losses[-1].device)
            summands.append(aux_losses[-1] * (len(targets) / divisor))
        if feature_loss is not None and feature_loss.terms:
            sidecar = sidecar_of(model)
            assert sidecar is not None, "terms on features need a sidecar"
            with torch.autocast(targets.labels.device.type, enabled=False):  # their products too are in float32
                summands.append(sidecar(lambda parts: feature_loss.total(captured, parts)))
        if summands:
            outputs["loss"] = torch.stack(summands).sum()
        if model_type_of(model).output_type is EMBEDDING_OUTPUTS:
            _detach_all_but_loss(outputs)
        return outputs

    hook = unwrap_parallel(model).register_forward_hook(
        lambda *call: add_remaining_losses(named_outputs(call[2], model))
    )
    try:
        with capture_features(model, feature_requests) as captured, aux.recorded():
            outputs, loss = _run(model, prepared, targets, head, run_fused_loss if is_lazy else None)
    finally:
        hook.remove()
    if loss is None:
        loss = chunked_loss.from_logits(DenseLogits(targets.gather_logits(outputs["logits"])))
    loss = loss.reshape(())
    if exact_losses:
        loss = _with_value(loss, exact_losses[-1])
    if outputs.get("loss") is not None:
        loss = loss + outputs["loss"]
        outputs["loss"] = loss.detach()
    if (aux_loss := aux_losses[-1]) is not None:
        chunked_loss.per_token["aux"] = aux_loss.detach().float().to(loss.device).expand(len(targets))
    return loss, without_made_logits(outputs, model)


def _detach_all_but_loss(outputs: ModelOutput) -> None:
    """Detach the outputs that the loss does not read: DDP waits for the gradient of whatever has a graph."""
    for name in [name for name, value in outputs.items() if name != "loss" and isinstance(value, Tensor)]:
        outputs[name] = outputs[name].detach()


def _with_value(loss: Tensor, value: Tensor) -> Tensor:
    """Return a loss that a wrapper cast to another dtype with its value before the cast, and with its own graph."""
    return loss if loss.dtype == value.dtype else value + (loss - loss.detach()).to(value.dtype)


def _run_rows(model: nn.Module, targets: Targets, head: OutputHead, rows: dict, is_replaced: bool) -> ModelOutput:
    """Return the outputs for the first rows of a batch; with `is_replaced` the head returns a placeholder."""
    prepared, first_targets = prepare_inputs(unwrap_model(model), rows), targets.first_rows(len(labels_of(rows)))
    return _run(model, prepared, first_targets, head, _placeholder_logits if is_replaced else None)[0]


def _placeholder_logits(lazy_logits: LazyLogits) -> Tensor:
    return lazy_logits.hidden.new_zeros(1, 1, 1)


def _run(
    model: nn.Module,
    inputs: dict,
    targets: Targets,
    head: OutputHead,
    on_head: Callable[[LazyLogits], Tensor] | None,
    of_head: Callable[..., LazyLogits] = LazyLogits.of_head,
) -> tuple[ModelOutput, Tensor | None]:
    """Run a model with its output head's forward replaced by `on_head`.

    Args:
        model: the model.
        inputs: keyword arguments of its forward.
        targets: T target tokens.
        head: its output head, as measured.
        on_head: receives the lazy logits and returns the output of the head; None computes logits.
        of_head: makes lazy logits of hidden states, weight, bias and scaling.

    Returns:
        (outputs, the output of the head after the wrappers' hooks; None if the head computed logits).
    """
    scaling, module, returned = head.scaling, head.module, []
    if scaling is None or on_head is None:
        return named_outputs(model(**inputs), model), None
    assert isinstance(module, nn.Linear)

    def forward(hidden: Tensor) -> Tensor:
        returned.append(on_head(of_head(targets.gather(hidden), module.weight, module.bias, scaling)))
        return returned[-1]

    received: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: received.append(output))
    try:
        with replaced_forward(module, forward):
            outputs = named_outputs(model(**inputs), model)
    finally:
        hook.remove()
    return outputs, received[-1] if returned else None


def measure_output_head(model: nn.Module, inputs: dict) -> OutputHead:
    """Measure the output head of a model whose first forward runs inside another model's; see `output_head`."""
    return output_head(model, prepare_inputs(unwrap_model(model), inputs))


def measure_before_student_loss(model: nn.Module, inputs: dict, targets: Targets) -> None:
    """Run the short forwards that `forward_with_loss` needs at its first call.

    It is called before the step if the model is trained inside another model's forward, or its features are captured
    there: the short forwards must not run inside it.

    Args:
        model: as prepared, wrappers included.
        inputs: the collator's batch.
        targets: T target tokens.
    """
    head = measure_output_head(model, inputs)
    plan_aux_losses(model, inputs, partial(_run_rows, model, targets, head), targets)
