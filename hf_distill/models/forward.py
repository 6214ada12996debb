"""One forward of a model whose output head sees asked tokens only, or is not run at all.

The head's `forward` is swapped for the call, inside the model's own forward, so wrappers (DDP, ZeRO-3, FSDP) gather its
weights as they always do. What the swapped head returns travels on through the model; what is meant for us is taken
from the head's output by a hook, as wrappers left it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..losses.fused import ChunkedLoss
from .aux_losses import AuxLosses, labels_of, plan_aux_losses
from .feature_capture import capture_features
from .features import FeatureLoss
from .model_call import named_outputs, prepare_inputs
from .model_types import unwrap_model, unwrap_parallel
from .output_head import OutputHead, cast_like_autocast, output_head, replaced_forward
from .sidecar import sidecar_of


def extract_signals(
    model: nn.Module, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]
) -> Signals:
    """What a teacher says about the asked tokens, as hidden states and head where it has one, without running it.

    Args:
        model: a model in eval mode; the caller turns gradients off.
        inputs: the collator's batch.
        targets: the asked tokens.
        feature_requests: features to be kept, with their tokens.
    """
    inputs = prepare_inputs(unwrap_model(model), inputs)
    head, heads = output_head(model, inputs), []

    def keep(lazy_logits: LazyLogits) -> Tensor:
        heads.append(lazy_logits.detach())
        return _no_logits(lazy_logits)

    with capture_features(model, feature_requests) as found:
        outputs, sent_on = _run(model, inputs, targets, head, keep)
    device = targets.labels.device  # of the student; a teacher may be spread over several
    features = {tap: feature.to(device) for tap, feature in found.items()}
    return Signals(DenseLogits(targets.gather_logits(outputs.logits)) if sent_on is None else heads[0], features)


@dataclass(frozen=True)
class StepLosses:
    """What is computed inside a student's forward; made there, once the source of its logits is known.

    head:     of its logits
    features: of its features
    own:      [] a loss of a teacher that trains beside it, which leaves with the student's; None: there is none
    """

    head: ChunkedLoss
    features: FeatureLoss
    own: Tensor | None = None


def forward_with_loss(
    model: nn.Module,
    inputs: dict,
    targets: Targets,
    feature_keys: Mapping[FeatureKey, Targets],
    jobs: Callable[[LazyLogits | DenseLogits], StepLosses],
    keep_logits: bool = False,
) -> tuple[Tensor, Any, StepLosses]:
    """The objective over asked tokens / num_items, [], the student's outputs, and the jobs, with per-token values.

    Args:
        model: as prepared, wrappers included; with features, its sidecar attached.
        inputs: the collator's batch.
        targets: the asked tokens.
        feature_keys: features of the student to be kept, with their tokens.
        jobs: makes what is to be computed of the source of its logits; called in the model's forward.
        keep_logits: make the logits of all positions, and leave them in the outputs (metrics need them).
    """
    prepared = prepare_inputs(unwrap_model(model), inputs)
    head = output_head(model, prepared)
    fused: list[StepLosses] = []  # in this forward; a model may be run twice
    made: list[StepLosses] = []
    plan = plan_aux_losses(model, inputs, partial(_run_rows, model, targets, head), targets)
    aux, lazy = AuxLosses(model, inputs, plan), not (keep_logits or plan.needs_logits)
    added: list[Tensor | None] = []

    def fuse(source: LazyLogits) -> Tensor:
        fused.append(jobs(source))
        loss, own = fused[-1].head.from_hidden(source), fused[-1].own
        loss = loss if own is None else loss + own
        return loss.reshape(1, 1, 1).clone()  # FSDP2 warns of views, on which hooks can get lost

    def at_end(outputs: Any) -> Any:
        """What did not leave through the head leaves as the model's `loss`, where DDP sees it."""
        made.append(fused[-1] if fused else jobs(DenseLogits(targets.gather_logits(outputs.logits))))
        parts = [] if fused or made[-1].own is None else [made[-1].own]
        fused.clear()
        added.append(aux.of(outputs))
        if added[-1] is not None:  # by this batch's share of the target tokens of the global batch
            items = targets.divisor(made[-1].head.num_items).to(added[-1].device)
            parts.append(added[-1] * (len(targets) / items))
        if made[-1].features.terms:
            sidecar: Any = sidecar_of(model)
            parts.append(sidecar(lambda its: made[-1].features.total(found, its)))
        if parts:
            outputs["loss"] = torch.stack(parts).sum()
        return outputs

    hook = unwrap_parallel(model).register_forward_hook(lambda *call: at_end(named_outputs(call[2], model)))
    try:
        with capture_features(model, feature_keys) as found, aux.recorded():
            outputs, loss = _run(model, prepared, targets, head, fuse if lazy else None)
    finally:
        hook.remove()
    loss = made[-1].head.from_logits(targets.gather_logits(outputs.logits)) if loss is None else loss.reshape(())
    if outputs.get("loss") is not None:
        loss = loss + outputs["loss"]
        outputs["loss"] = loss.detach()
    if added[-1] is not None:
        made[-1].head.per_token["aux"] = added[-1].detach().float().to(loss.device).expand(len(targets))
    return loss, outputs, made[-1]


def _run_rows(model: nn.Module, targets: Targets, head: OutputHead, rows: dict, replaced: bool) -> Any:
    """The outputs for the first rows of a batch; with `replaced` the head returns a number in place of logits."""
    prepared = prepare_inputs(unwrap_model(model), rows)
    return _run(model, prepared, targets.first_rows(len(labels_of(rows))), head, _no_logits if replaced else None)[0]


def _no_logits(lazy_logits: LazyLogits) -> Tensor:
    return lazy_logits.hidden.new_zeros(1, 1, 1)


def _run(
    model: nn.Module, inputs: dict, targets: Targets, head: OutputHead, on_head: Callable[[LazyLogits], Tensor] | None
) -> tuple[Any, Tensor | None]:
    """(outputs, what `on_head` sent through the head; None where the head made logits)."""
    scaling, module, sent = head.scaling, head.module, []
    if scaling is None or on_head is None:
        return named_outputs(model(**inputs), model), None

    def forward(hidden: Tensor) -> Tensor:
        hidden, weight, bias = cast_like_autocast(targets.gather(hidden), module.weight, module.bias)
        sent.append(on_head(LazyLogits(hidden, weight, bias, scaling)))
        return sent[-1]

    received: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: received.append(output))
    try:
        with replaced_forward(module, forward):
            outputs = named_outputs(model(**inputs), model)
    finally:
        hook.remove()
    return outputs, received[-1] if sent else None


def measure_output_head(model: nn.Module, inputs: dict) -> OutputHead:
    """See `output_head`: for a model whose first forward is inside another model's, which is no place to measure."""
    return output_head(model, prepare_inputs(unwrap_model(model), inputs))


def measure_before_student_loss(model: nn.Module, inputs: dict, targets: Targets) -> None:
    """Run the short forwards that `forward_with_loss` needs at its first call.

    For a model that learns inside another model's forward, or whose features are captured there: neither is a place
    for other forwards.

    Args:
        model: as prepared, wrappers included.
        inputs: the collator's batch.
        targets: the target tokens.
    """
    head = measure_output_head(model, inputs)
    plan_aux_losses(model, inputs, partial(_run_rows, model, targets, head), targets)
