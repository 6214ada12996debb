"""What both of TRL's trainers need: its names of metrics, adapters on the head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..trainer.metrics import mean_of
from ..trainer.trainer import DistillMixin


class TRLMixin(DistillMixin):
    """`DistillMixin` for a trainer of TRL: what TRL logs of the student keeps its name."""

    _is_vlm: bool
    loads_models = True

    def incompatible_arguments(self) -> list[str]:
        """As the mixin's; adapters that lengthen the rows, and rows with images."""
        problems, configs = super().incompatible_arguments(), getattr(self.model, "peft_config", {})
        if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
            problems.append(
                "prompt learning (prompt tuning, prefix tuning, P-tuning) puts virtual tokens before the rows, where "
                "the teacher has none: use an adapter of weights, such as LoRA"
            )
        if self._is_vlm:
            problems.append("images are not distilled: use a tokenizer as processing_class and rows of text")
        return problems

    def _average_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """As the mixin's; and `mean_token_accuracy` and `entropy` of the student."""
        means = super()._average_metrics(sums)
        if "accuracy" in sums:
            means["mean_token_accuracy"] = mean_of(sums["accuracy"], sums["measured"])
            means["entropy"] = mean_of(sums["student_entropy"], sums["measured"])
        return means


@contextmanager
def adapted_heads(module: Any, allowed: bool) -> Iterator[None]:
    """While it lasts, the constructor in a module of TRL accepts an adapter on `lm_head`.

    TRL refuses it because its losses multiply by `lm_head.weight` themselves. Ours run the head, adapter included.

    Args:
        module: which checks `isinstance(head, BaseTunerLayer)`, a name that it has where peft is installed.
        allowed: False changes nothing.
    """
    checked = vars(module).get("BaseTunerLayer")
    if checked is None or not allowed:
        yield
        return
    module.BaseTunerLayer = ()  # no object is an instance of it
    try:
        yield
    finally:
        module.BaseTunerLayer = checked
