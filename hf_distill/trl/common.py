"""What both TRL trainers share: TRL's metric names, refused options, and adapters on the output head."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..trainer.metrics import mean_of
from ..trainer.trainer import DistillMixin


class TRLMixin(DistillMixin):
    """`DistillMixin` for TRL's trainers; the student's metrics keep the names that TRL logs."""

    loads_models = True

    def incompatible_arguments(self) -> list[str]:
        """Also return problems with adapters that lengthen the rows."""
        problems, configs = super().incompatible_arguments(), getattr(self.model, "peft_config", {})
        if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
            problems.append(
                "prompt learning (prompt tuning, prefix tuning, P-tuning) prepends virtual tokens to the rows, which "
                "the teacher does not have: use an adapter of weights, such as LoRA"
            )
        return problems

    def _average_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Also return `mean_token_accuracy` and `entropy` of the student."""
        means = super()._average_metrics(sums)
        if "accuracy" in sums:
            means["mean_token_accuracy"] = mean_of(sums["accuracy"], sums["measured"])
            means["entropy"] = mean_of(sums["student_entropy"], sums["measured"])
        return means


@contextmanager
def adapted_heads(module: ModuleType, is_allowed: bool) -> Iterator[None]:
    """Let a trainer's constructor in a TRL module accept an adapter on `lm_head` while the context lasts.

    TRL refuses such adapters because its losses multiply by `lm_head.weight` themselves. The losses of this package run
    the output head with its adapter.

    Args:
        module: the TRL module, which checks `isinstance(head, BaseTunerLayer)`; it has the name if peft is installed.
        is_allowed: False changes nothing.
    """
    tuner_class = vars(module).get("BaseTunerLayer")
    if tuner_class is None or not is_allowed:
        yield
        return
    vars(module)["BaseTunerLayer"] = ()  # no object is an instance of it
    try:
        yield
    finally:
        vars(module)["BaseTunerLayer"] = tuner_class
