"""FLOP of distillation, by the rule of thumb and as counted by torch, of a large pair of models and of this one."""

from typing import Any

from cells import LENGTH

from hf_distill.planning import rule_of_thumb
from hf_distill.planning.flops import counted_forward, six_nd

PRETRAINING = 2e12  # tokens of the pretraining of SmolLM2-135M, assumed for the large pair too


def counted(teacher: Any, student: Any) -> dict[str, Any]:
    """Return parameters and FLOP per token of a pair: of a forward, as counted, and of distillation, by the rule."""
    models = {"teacher": teacher, "student": student}
    result: dict[str, Any] = {name: {"parameters": model.num_parameters()} for name, model in models.items()}
    for name, model in models.items():
        result[name]["counted_forward"] = counted_forward(model.config, LENGTH) / LENGTH  # type: ignore[operator]
    rule = rule_of_thumb(result["teacher"]["parameters"], result["student"]["parameters"], 1)
    result["rule"] = {"teacher": rule.teacher, "student": rule.student}
    return result


def share(teacher: float, student: float, tokens: float) -> tuple[float, float]:
    """Return the FLOP of a distillation by the rule of thumb, and their share of pretraining the student."""
    total = rule_of_thumb(teacher, student, tokens).total
    return total, total / six_nd(student, PRETRAINING)
