"""What distillation computes, in FLOP: a large pair of models and this one, by rule and as torch counts."""

from typing import Any

from cells import LENGTH

from hf_distill.planning import rule_of_thumb
from hf_distill.planning.flops import counted_forward, six_nd

PRETRAINING = 2e12  # tokens that SmolLM2-135M is trained on, and the large pair is said to be


def counted(teacher: Any, student: Any) -> dict[str, Any]:
    """Parameters of a pair, and FLOP a token: of a forward, as counted, and of distillation, by rule."""
    models = {"teacher": teacher, "student": student}
    found: dict[str, Any] = {name: {"parameters": model.num_parameters()} for name, model in models.items()}
    for name, model in models.items():
        found[name]["counted_forward"] = counted_forward(model.config, LENGTH) / LENGTH  # type: ignore[operator]
    rule = rule_of_thumb(found["teacher"]["parameters"], found["student"]["parameters"], 1)
    found["rule"] = {"teacher": rule.teacher, "student": rule.student}
    return found


def share(teacher: float, student: float, tokens: float) -> tuple[float, float]:
    """FLOP of a distillation by rule, and its share of the student's own pretraining."""
    total = rule_of_thumb(teacher, student, tokens).total
    return total, total / six_nd(student, PRETRAINING)
