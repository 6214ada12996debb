"""On-policy distillation: the student writes completions by TRL's generation, the teacher judges every token."""

import math
import random
from typing import Any

import torch
import trl.trainer.distillation_trainer
from torch import Tensor, nn
from trl import DistillationTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import flush_left

from ..core.schedule import schedule_integral
from ..core.targets import IGNORE_INDEX
from ..data import Collator, prompt_rows
from ..errors import DistillError, collect_errors, raise_if_any
from ..trainer.config import DistillArguments
from ..trainer.upstream import DISTILLATION_TRAINER, check_upstream
from .common import TRLMixin, adapted_heads
from .on_policy_config import OnPolicyDistillConfig
from .teacher_arguments import resolve_teacher

check_upstream("trl", DistillationTrainer, DISTILLATION_TRAINER)


class _Generating(DistillationTrainer):
    """`DistillationTrainer` without its teacher, at the temperature of sampling."""

    is_distilling = False
    _signature_columns: Any

    def __init__(self, model: Any, args: Any, **kwargs):
        # TRL reads one temperature, while it is built, for sampling and loss. The loss is not its own here.
        loss_temperature, args.temperature = args.temperature, args.sampling_temperature
        try:
            with adapted_heads(trl.trainer.distillation_trainer, self.is_distilling):
                super().__init__(model, teacher_model=None, args=args, **kwargs)
        finally:
            args.temperature = loss_temperature


class OnPolicyDistillTrainer(TRLMixin, _Generating):
    """`trl.DistillationTrainer`, its generation as it is, with any teacher and any objective.

    L = sum over completion tokens of (alpha * T^2 * divergence + others) and, where the completion is the data set's,
    (1 - alpha) * cross entropy; divided by the completion tokens of the global batch, generated ones included

    Rows have `prompt` and, for on_policy_fraction < 1, `completion`; or `messages`, whose last turn is the completion.
    In each step the student writes floor or ceil of the fraction of every rank's rows; which, follows from seed, step
    and rank. Evaluation asks the data set's completions where the rows have them, and else generates; rows with
    `input_ids` and `labels` are evaluated as they are.

    Private methods of TRL that are overridden, see `upstream`: `_generate_and_score_completions` chooses the rows,
    `_generate_single_turn` generates those only, `_set_signature_columns_if_needed` keeps the column `completion`.
    Public ones beside `DistillMixin`'s: none but `compute_loss`, which turns TRL's batch into ids and labels.

    Args:
        model: the student: a model, or its id or path (loaded by TRL with `args.model_init_kwargs`).
        args: an `OnPolicyDistillConfig`.
        teacher: a model, the id or path of one, or a `Teacher`.
        everything else: as in `DistillationTrainer`, by name.

    Raises:
        DistillError: teacher and student do not fit, or an argument cannot work with distillation; says why.
    """

    def __init__(self, model: Any, args: OnPolicyDistillConfig | None = None, *, teacher: Any = None, **kwargs):
        args = OnPolicyDistillConfig() if args is None else args
        problems = []
        if not isinstance(args, OnPolicyDistillConfig):
            problems.append(f"args is a {type(args).__name__}: use OnPolicyDistillConfig")
        elif args.alpha == 0 and not args.losses:
            problems.append("alpha is 0 and there are no losses, so nothing of the teacher's is learnt: use SFTTrainer")
        if kwargs.pop("teacher_model", None) is not None:
            problems.append("teacher_model is TRL's name: pass the teacher as `teacher=`")
        with collect_errors(problems):
            teacher = resolve_teacher(args, teacher, kwargs.get("teachers"))
        if teacher is None and kwargs.get("teachers") is None:
            problems.append(
                "on-policy distillation needs a teacher: pass `teacher=`, a model, its id or a Teacher, or set "
                "teacher_model_name_or_path"
            )
        raise_if_any(problems)
        self._given: list[dict | None] | None = None
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = _prompted(kwargs.get(name), name)
        super().__init__(model, args, teacher=teacher, **kwargs)

    def _set_objective(self, fields: DistillArguments, renew: bool) -> None:
        """As the mixin's; vLLM can be sent the student's weights alone."""
        super()._set_objective(fields, renew)
        if self.args.use_vllm and self._sidecar is not None:
            raise DistillError(
                "use_vllm sends every parameter of the student to vLLM, the projectors of `losses` included, which it "
                "does not know: use losses without projectors or learned layers, or generate with transformers."
            )

    def incompatible_arguments(self) -> list[str]:
        """Rows and tools that cannot be had both ways."""
        problems, mixed = super().incompatible_arguments(), self.args.mixes
        if mixed and self.tools:
            problems.append(
                "tools would be called for the data set's completions too: use on_policy_fraction=1, or no tools"
            )
        columns = getattr(self.train_dataset, "column_names", None)
        if mixed and isinstance(columns, list) and "completion" not in columns:
            problems.append(
                f"on_policy_fraction is {self.args.on_policy_fraction}, but train_dataset has no column `completion`, "
                f"only {sorted(columns)}: add it, or use on_policy_fraction=1"
            )
        return problems

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "completion"])]

    def _own_rows(self, rows: list[dict]) -> list[bool]:
        """Which rows of this rank's batch the student completes; as many on every rank, so that all generate or none.

        Equal for equal seed, step and rank; the share is exact over the steps.
        """
        if not self.model.training:
            return ["completion" not in row or bool(self.tools) for row in rows]
        step, steps, count = self.state.global_step, max(self.state.max_steps, 1), len(rows)
        before, after = (
            math.floor(schedule_integral(self.args.fraction, i / steps) * steps * count + 1e-6)
            for i in (step, step + 1)
        )
        draw = random.Random(f"{self.args.seed}-{step}-{self.args.process_index}")  # noqa: S311  of rows, no secret
        chosen = draw.sample(range(count), after - before)
        return [i in chosen for i in range(count)]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        if "labels" in inputs[0] and not self.model.training:
            batch = Collator(self._tokenizer.pad_token_id, self.sources)(inputs)
            return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        own = self._own_rows(inputs)
        self._given = [None if mine else row for mine, row in zip(own, inputs, strict=True)]
        batch = super()._generate_and_score_completions(inputs)
        batch["has_labels"] = ~torch.tensor(own, device=self.accelerator.device)
        if "source" in inputs[0]:
            batch["source"] = torch.tensor([row["source"] for row in inputs], device=self.accelerator.device)
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *more, **kwargs) -> list[list[int]]:
        """As TRL's, for the rows that the student completes; later turns of tools are its own altogether."""
        given, self._given = self._given or [None] * len(prompt_ids), None
        own = [ids for ids, row in zip(prompt_ids, given, strict=True) if row is None]
        written = iter(super()._generate_single_turn(own, *more, **kwargs) if own else ())
        return [
            next(written) if row is None else self._completion(row, ids)
            for ids, row in zip(prompt_ids, given, strict=True)
        ]

    def _completion(self, row: dict, prompt_ids: list[int]) -> list[int]:
        """The data set's completion of a row, as ids that follow those of its prompt; ended as SFTTrainer ends it."""
        if is_conversational(row):
            whole = self.processing_class.apply_chat_template(
                row["prompt"] + row["completion"], tokenize=True, return_dict=True, **self.chat_template_kwargs
            )["input_ids"]
        else:
            end = self._tokenizer.eos_token
            text = row["completion"] if row["completion"].endswith(end) else row["completion"] + end
            whole = self.processing_class(text=row["prompt"] + text)["input_ids"]
            if whole[: len(prompt_ids)] != prompt_ids:  # tokens merge across the boundary
                whole = prompt_ids + self.processing_class(text=text, add_special_tokens=False)["input_ids"]
        completion = whole[len(prompt_ids) :][: self.max_completion_length]
        if whole[: len(prompt_ids)] != prompt_ids or not completion:
            raise DistillError(
                f"The chat template does not continue the prompt by the completion {row['completion']!r}, or it is "
                "empty: the student would learn another context than the one it generates from. Use a template "
                "that renders a prompt the same way with and without its answer, or on_policy_fraction=1."
            )
        return completion

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective over completions; see the class. `num_items_in_batch` is TRL's count of the batch it made."""
        items = inputs["num_items_in_batch"] if model.training else None
        if items is not None and not self.args.average_tokens_across_devices:
            items = items / self.accelerator.num_processes
        rows = inputs if "labels" in inputs else _as_rows(inputs)
        return super().compute_loss(model, rows, return_outputs, items)


def _prompted(rows: Any, name: str) -> Any:
    """Data sets with prompts, from whatever TRL takes as one."""
    if isinstance(rows, dict):
        return {key: _prompted(part, f"{name}[{key!r}]") for key, part in rows.items()}
    tokens = name.startswith("eval") and {"input_ids", "labels"} <= {*(getattr(rows, "column_names", None) or ())}
    return rows if tokens or not hasattr(rows, "column_names") else prompt_rows(rows, name)


def _as_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's prompts [B, P] and completions [B, C] as right-padded ids, mask and labels, [B, S]."""
    asked = batch["completion_mask"] * batch.get("tool_mask", 1)
    asked = torch.cat([torch.zeros_like(batch["prompt_mask"]), asked], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask, ids, asked = flush_left(mask, ids, asked)
    labels = ids.masked_fill(asked == 0, IGNORE_INDEX)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels, "has_labels": batch["has_labels"]}
    return rows | ({"source": batch["source"][:, None].expand_as(ids)} if "source" in batch else {})
