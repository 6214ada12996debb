"""On-policy distillation: the student generates completions with TRL, and the teacher scores every token of them."""

import math
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import trl.trainer.distillation_trainer
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from trl import DistillationTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import (
    flush_left,
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from ..core.row_values import ORIGIN, WEIGHT
from ..core.schedule import schedule_integral
from ..core.targets import IGNORE_INDEX
from ..data import Collator, prompt_rows
from ..data.formats import TEACHER_PROMPT
from ..data.row_values import collate_row_values
from ..errors import DistillError, collect_errors, raise_if_any
from ..teachers import Teacher
from ..trainer.config import DistillArguments
from ..trainer.sidecar import trained_sidecar
from ..trainer.teacher_argument import TeacherArgument
from ..trainer.trainer import LossOutput
from ..trainer.upstream import DISTILLATION_TRAINER, check_upstream
from .common import TRLMixin, adapted_heads
from .decoding import generating, sampling_on_cpu
from .image_rows import (
    IMAGE_COLUMNS,
    TOKEN_FIELDS,
    fields_of_images,
    keep_padded_images,
    messages_of,
    padding_on_the_left,
)
from .on_policy_config import OnPolicyDistillConfig
from .teacher_arguments import resolve_teacher

check_upstream("trl", DistillationTrainer, DISTILLATION_TRAINER)


class _GenerationTrainer(DistillationTrainer):
    """`DistillationTrainer` without its teacher, which generates at the sampling temperature."""

    is_distilling = False
    _signature_columns: Any

    def __init__(self, model: PreTrainedModel | str, args: OnPolicyDistillConfig, **kwargs: Any):
        # TRL's constructor reads one temperature for sampling and loss; here the loss has another one.
        loss_temperature, args.temperature = args.temperature, args.sampling_temperature
        try:
            with adapted_heads(trl.trainer.distillation_trainer, self.is_distilling):
                super().__init__(model, teacher_model=None, args=args, **kwargs)
        finally:
            args.temperature = loss_temperature


class OnPolicyDistillTrainer(TRLMixin, _GenerationTrainer):
    """`trl.DistillationTrainer` with any teacher and any objective, and the same distribution of completions.

    L = [sum over completion tokens of (alpha * T^2 * divergence + other losses)
         + sum over the data set's completion tokens of (1 - alpha) * cross entropy]
        / completion tokens of the global batch, generated ones included

    Rows have `prompt` and, for on_policy_fraction < 1, `completion`; or `messages`, whose last turn is the completion.
    In each step the student generates completions for a fraction of every rank's rows, rounded down or up; seed, step
    and rank determine the rows. Evaluation uses the data set's completions if the rows have them, and generates
    completions otherwise; rows with `input_ids` and `labels` are evaluated as they are.

    With a processor as `processing_class`, rows may have `images` or `image`, which student and teacher read.

    Overridden private methods of TRL (see `trainer/upstream.py`): `_generate_and_score_completions` chooses the rows,
    `_generate` and `_generate_single_turn` generate for these rows only, with their images, `_prepare_inputs` sorts the
    rows of an optimizer step by length, and `_set_signature_columns_if_needed` keeps the column `completion`. The only
    overridden public method besides those of `DistillMixin` is `compute_loss`, which turns TRL's batch into ids and
    labels.

    Args:
        model: the student: a model, or its id or path (loaded by TRL with `args.model_init_kwargs`).
        args: an `OnPolicyDistillConfig`.
        teacher: a model, the id or path of one, or a `Teacher`.
        kwargs: keyword arguments of `DistillationTrainer`.

    Raises:
        DistillError: teacher and student do not fit, or an argument does not work with distillation; the message lists
            the reasons.
    """

    collates_batches = False
    args: OnPolicyDistillConfig
    model: nn.Module
    processing_class: Any
    chat_template_kwargs: dict[str, Any]
    _buffered_inputs: Any

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: OnPolicyDistillConfig | None = None,
        *,
        teacher: TeacherArgument | None = None,
        **kwargs: Any,
    ):
        args = OnPolicyDistillConfig() if args is None else args
        problems = []
        if not isinstance(args, OnPolicyDistillConfig):
            problems.append(f"args is a {type(args).__name__}: use OnPolicyDistillConfig")
        elif not args.uses_soft_labels and not args.losses:
            problems.append(
                "alpha is 0 and there are no `losses`, so the student learns nothing from the teacher: use SFTTrainer"
            )
        if kwargs.pop("teacher_model", None) is not None:
            problems.append("teacher_model is TRL's argument: pass the teacher as `teacher=`")
        with collect_errors(problems):
            teacher = resolve_teacher(args, teacher, kwargs.get("teachers"))
        if teacher is None and kwargs.get("teachers") is None:
            problems.append(
                "on-policy distillation needs a teacher: pass `teacher=`, a model, its id or a Teacher, or set "
                "teacher_model_name_or_path"
            )
        raise_if_any(problems)
        self._completed_rows: list[dict | None] | None = None  # None for each row that the student completes
        self._prompts: list[Any] = []  # of the rows of the batch for which completions are generated
        self._generation_seconds = 0.0  # of the batch
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = _with_prompts(kwargs.get(name), name)
        super().__init__(model, args, teacher=teacher, **kwargs)

    def setup_distillation(self, teacher: Teacher, distill_args: DistillArguments) -> None:
        """Also check that the teacher can read the longest prompt with the longest completion; streams are not checked.

        Raises:
            DistillError: see `DistillMixin.setup_distillation`; or rows may become longer than the teacher can read.
        """
        super().setup_distillation(teacher, distill_args)
        limit, added = teacher.context_length, self.max_completion_length
        if limit is None or added is None:
            return
        for name, rows in {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}.items():
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                longest = max(self._prompt_lengths(part), default=0)
                if longest + added > limit:
                    raise DistillError(
                        f"{name} has a prompt of {longest} tokens, and a completion may have {added} "
                        f"(max_completion_length), but the teacher reads rows of at most {limit} tokens: lower "
                        "max_completion_length, remove the long prompts (in a recipe, lower data.max_length), or use "
                        "a teacher that reads longer rows. A server may be started with a longer context: "
                        "--max-model-len (vLLM), --context-length (SGLang) or --max-batch-tokens (hf-distill serve)."
                    )

    def _prompt_lengths(self, rows: Any) -> Iterator[int]:
        """Yield the number of tokens of each prompt that the teacher reads; nothing for streams and tokenized rows."""
        columns = getattr(rows, "column_names", None) or ()
        if not hasattr(rows, "__len__") or "prompt" not in columns:
            return
        column = TEACHER_PROMPT.column if TEACHER_PROMPT.column in columns else "prompt"
        for row in rows.select_columns([column, *(name for name in IMAGE_COLUMNS if name in columns)]):
            if row[column]:
                yield len(self._prompt_ids({**row, "prompt": row[column]}))

    def _inner_training_loop(self, *args: object, **kwargs: object) -> TrainOutput:
        """Also discard the completions of an earlier training, which an error may have ended within a step."""
        self._step, self._buffered_inputs = 0, None
        return super()._inner_training_loop(*args, **kwargs)

    def _set_objective(self, fields: DistillArguments, renew: bool) -> None:
        """Also check that vLLM gets no weights but the student's.

        Raises:
            DistillError: vLLM is used, and the losses have projectors or learned layers.
        """
        super()._set_objective(fields, renew)
        if self.args.use_vllm and trained_sidecar(self.model) is not None:
            raise DistillError(
                "use_vllm sends every parameter of the student to vLLM, including the projectors of `losses`, which "
                "vLLM does not have: use losses without projectors or learned layers, or generate with transformers."
            )

    def incompatible_arguments(self) -> list[str]:
        """Also return problems with rows and tools if only a part of the completions is generated."""
        problems, is_mixed = super().incompatible_arguments(), self.args.is_mixed
        if is_mixed and self.tools:
            problems.append(
                "tools would be called for the data set's completions too: use on_policy_fraction=1, or no tools"
            )
        columns = getattr(self.train_dataset, "column_names", None)
        if is_mixed and isinstance(columns, list) and "completion" not in columns:
            problems.append(
                f"on_policy_fraction is {self.args.on_policy_fraction}, but train_dataset has no column `completion`, "
                f"only {sorted(columns)}: add it, or use on_policy_fraction=1"
            )
        return problems

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "completion", TEACHER_PROMPT.column])]

    def _rows_to_generate(self, rows: list[dict]) -> list[bool]:
        """Choose the rows of this rank's batch for which the student generates completions.

        Their number is the same on every rank, so all ranks generate or none does. The choice depends on seed,
        step and rank, and the share is exact over the steps.
        """
        if not self.model.training:
            return ["completion" not in row or bool(self.tools) for row in rows]
        step, steps, count = self.state.global_step, max(self.state.max_steps, 1), len(rows)
        before, after = (
            math.floor(schedule_integral(self.args.fraction, i / steps) * steps * count + 1e-6)
            for i in (step, step + 1)
        )
        draw = random.Random(f"{self.args.seed}-{step}-{self.args.process_index}")  # noqa: S311  chooses rows, no secret
        chosen = draw.sample(range(count), after - before)
        return [i in chosen for i in range(count)]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        if "labels" in inputs[0] and not self.model.training:
            batch = Collator(self._tokenizer.pad_token_id, self.sources)(inputs)
            return dict(send_to_device(batch, self.accelerator.device))
        is_generated = self._rows_to_generate(inputs)
        self._completed_rows = [None if each else row for each, row in zip(is_generated, inputs, strict=True)]
        with padding_on_the_left(self._tokenizer):
            batch = keep_padded_images(super()._generate_and_score_completions(inputs))
        batch["has_labels"] = ~torch.tensor(is_generated, device=self.accelerator.device)
        batch |= self._teacher_prompts(inputs)
        batch |= send_to_device(self._row_values(inputs, is_generated), self.accelerator.device)
        if "source" in inputs[0]:
            batch["source"] = torch.tensor([row["source"] for row in inputs], device=self.accelerator.device)
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """Prepare as TRL does, with rows of similar length in one micro-batch, so that micro-batches have less padding.

        The optimizer step sums over the same rows, whatever micro-batch they are in.
        """
        pieces = self.args.gradient_accumulation_steps
        if not self.model.training or pieces == 1:
            return dict(super()._prepare_inputs(generation_batch))
        if self._step % pieces == 0 or self._buffered_inputs is None:
            batch: Any = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            micro_batches: Any = split_tensor_dict(_longest_first(shuffle_sequence_dict(batch)), pieces)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(each) for each in micro_batches]
        return dict(self._buffered_inputs[self._step % pieces])

    def _row_values(self, rows: list[dict], is_generated: list[bool]) -> dict[str, Tensor]:
        """Return the weights of rows that have them, and the origins if the losses depend on them, [B].

        The origin of a completion is the student if it was generated, else that of its row, or the data.
        """
        row_values = [{WEIGHT: row[WEIGHT]} if WEIGHT in row else {} for row in rows]
        if self.reads_origins:
            origins = [
                "student" if each else row.get(ORIGIN, "data") for each, row in zip(is_generated, rows, strict=True)
            ]
            row_values = [{**row, ORIGIN: origin} for row, origin in zip(row_values, origins, strict=True)]
        return collate_row_values(row_values)

    def _teacher_prompts(self, rows: list[dict]) -> dict[str, Tensor]:
        """Return the tokens of the column `teacher_prompt`, [B, P], and their mask; empty without that column.

        Raises:
            DistillError: some rows have no teacher prompt, or it is no prompt.
        """
        column = TEACHER_PROMPT.column
        if not any(column in row for row in rows):
            return {}
        if not all(row.get(column) for row in rows):
            raise DistillError(f"Some rows of a batch have no `{column}`: give one to every row, or remove the column.")
        if self.args.cross_tokenizer is not None:
            raise DistillError(
                f"The column `{column}` does not work with cross_tokenizer in on-policy distillation, where the "
                "teacher reads the prompt and the completion of the student in its own tokens: remove the column."
            )
        if self.tools:
            raise DistillError(f"tools do not work with the column `{column}`: remove one of them.")
        ids = [torch.tensor(self._prompt_ids({"prompt": row[column]})) for row in rows]
        pad, masks = self._tokenizer.pad_token_id, [torch.ones_like(row) for row in ids]
        prompts = {
            "teacher_prompt_ids": pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left"),
            "teacher_prompt_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
        }
        return send_to_device(prompts, self.accelerator.device)

    def _prompt_ids(self, row: dict) -> list[int]:
        """Tokenize the prompt of a row, with its images, as the trainer tokenizes those of the student."""
        if isinstance(row["prompt"], str):
            return self._text_ids(row["prompt"])
        return self._message_ids(
            row, tools=self.tools or None, chat_template=self.chat_template, add_generation_prompt=True
        )

    def _text_ids(self, text: str, **options: Any) -> list[int]:
        """Tokenize a text; a processor returns a list of rows."""
        ids = self.processing_class(text=text, **options)["input_ids"]
        return ids[0] if self._is_vlm else ids

    def _message_ids(self, row: dict, completion: bool = False, **options: Any) -> list[int]:
        """Tokenize the messages of a row's prompt, with the completion if requested; a processor also gets images."""
        if self._is_vlm:
            messages = messages_of(row, completion)
        else:
            messages = row["prompt"] + row["completion"] if completion else row["prompt"]
        ids = self.processing_class.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options, **self.chat_template_kwargs
        )["input_ids"]
        return ids[0] if self._is_vlm else ids

    def _generate(self, prompts: list) -> tuple:
        """Generate as TRL does; in a batch with images, rows without one get an empty list, which processors read."""
        self._prompts, self._generation_seconds = prompts, 0.0
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        self._prompts = []
        self._metrics["train" if self.model.training else "eval"]["generation_seconds"].append(self._generation_seconds)
        images = None if images is None else [of_row or [] for of_row in images]
        return prompt_ids, completion_ids, tool_mask, images, tool_images

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: list | None, multimodal_fields: dict, *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        """Generate for the rows that the student completes; after a tool call, for all rows."""
        rows, self._completed_rows = self._completed_rows or [None] * len(prompt_ids), None
        prompts = [ids for ids, row in zip(prompt_ids, rows, strict=True) if row is None]
        if prompts and multimodal_fields and len(prompts) < len(rows):  # their tensors cannot be taken by rows
            generated_prompts = [prompt for prompt, row in zip(self._prompts, rows, strict=True) if row is None]
            prompts, images, multimodal_fields = self._tokenize_prompts(generated_prompts)
        start = time.perf_counter()
        with self._generation_context():
            args = (prompts, images, multimodal_fields, *args)
            generated = iter(super()._generate_single_turn(*args, **kwargs) if prompts else ())
        self._generation_seconds += time.perf_counter() - start
        return [
            next(generated) if row is None else self._completion(row, ids)
            for ids, row in zip(prompt_ids, rows, strict=True)
        ]

    @contextmanager
    def _generation_context(self) -> Iterator[None]:
        """Prepare the student to generate with transformers: without dropout, and in the precision of the training.

        One autocast region around all steps casts each weight once. It would be cast in every step else, because the
        region of accelerate is a single forward. Sharded weights are left to their wrapper.
        """
        if self.use_vllm:
            yield
            return
        with ExitStack() as stack:
            # The cache would make a graph for each layer and length.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(generating(self.model))
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                stack.enter_context(self.accelerator.autocast())
                if not self._is_vlm:
                    model = self.accelerator.unwrap_model(self.model_wrapped)
                    stack.enter_context(sampling_on_cpu(model, self.generation_config))
            yield

    def _completion(self, row: dict, prompt_ids: list[int]) -> list[int]:
        """Return the ids of the data set's completion of a row, which ends as in SFTTrainer.

        Raises:
            DistillError: prompt and completion do not begin with the ids of the prompt, or the completion is empty.
        """
        if is_conversational(row):
            full_ids = self._message_ids(row, completion=True)
        else:
            end = self._tokenizer.eos_token
            text = row["completion"] if row["completion"].endswith(end) else row["completion"] + end
            full_ids = self._text_ids(row["prompt"] + text)
            if full_ids[: len(prompt_ids)] != prompt_ids:  # tokens merge across the boundary
                full_ids = prompt_ids + self._text_ids(text, add_special_tokens=False)
        completion = full_ids[len(prompt_ids) :][: self.max_completion_length]
        if full_ids[: len(prompt_ids)] != prompt_ids or not completion:
            raise DistillError(
                f"The chat template does not continue the prompt by the completion {row['completion']!r}, or the "
                "completion is empty: the student would be trained on another context than the one it generates from. "
                "Use a template that renders a prompt the same way with and without its answer, or "
                "on_policy_fraction=1."
            )
        return completion

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> LossOutput:
        """Compute the objective over completions; the divisor is TRL's count of completion tokens, see the class."""
        items = inputs["num_items_in_batch"] if model.training else None
        if items is not None and not self.args.average_tokens_across_devices:
            items = items / self.accelerator.num_processes
        rows = inputs if "labels" in inputs else _join_completions(inputs)
        return super().compute_loss(model, rows, return_outputs, items)


def _with_prompts(rows: Any, name: str) -> Any:
    """Make prompts and completions of the data sets that TRL accepts: one, or several in a dict."""
    if isinstance(rows, dict):
        return {key: _with_prompts(part, f"{name}[{key!r}]") for key, part in rows.items()}
    columns = {*(getattr(rows, "column_names", None) or ())}
    if TEACHER_PROMPT.column in columns and (images := sorted({*IMAGE_COLUMNS} & columns)):
        raise DistillError(
            f"{name} has the columns {TEACHER_PROMPT.column} and {', '.join(images)}: a prompt of the teacher has no "
            f"images. Remove {TEACHER_PROMPT.column}, so that the teacher reads the prompt and images of the student, "
            "or use rows without images."
        )
    if isinstance(rows, Dataset) and TEACHER_PROMPT.column in columns:
        _check_teacher_prompts(rows, name)
    is_tokenized = name.startswith("eval") and {"input_ids", "labels"} <= columns
    return rows if is_tokenized or not hasattr(rows, "column_names") else prompt_rows(rows, name)


def _check_teacher_prompts(rows: Dataset, name: str) -> None:
    """Check before training that every row has a prompt for the teacher; rows of a stream are checked in their batch.

    Raises:
        DistillError: one has none.
    """
    column = TEACHER_PROMPT.column
    lacking = [number for number, prompt in enumerate(rows[column]) if not prompt]
    if lacking:
        raise DistillError(
            f"{len(lacking)} of {len(rows)} rows of {name} have no `{column}`, the first is row {lacking[0]} (counted "
            "from 0): give one to every row, or remove the column."
        )


def _longest_first(batch: dict[str, Any]) -> dict[str, Any]:
    """Sort the rows of TRL's batch by their numbers of tokens."""
    order = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).argsort(descending=True, stable=True)
    return {
        name: values
        if values is None or (isinstance(values, Tensor) and values.dim() == 0)
        else values[order]
        if isinstance(values, Tensor)
        else [values[row] for row in order.tolist()]
        for name, values in batch.items()
    }


def _join_completions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join TRL's prompts [B, P] and completions [B, C] to right-padded ids, mask and labels, [B, S]."""
    of_rows = {name: batch[name] for name in ("has_labels", WEIGHT, ORIGIN) if name in batch}
    rows = _join(batch, "") | of_rows | fields_of_images(batch)
    if "teacher_prompt_ids" in batch:
        rows |= {f"teacher_{name}": values for name, values in _join(batch, "teacher_").items()}
    ids = rows["input_ids"]
    return rows | ({"source": batch["source"][:, None].expand_as(ids)} if "source" in batch else {})


def _join(batch: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Join the prompts of the student (prefix "") or of the teacher ("teacher_") with the completions."""
    prompt_ids, prompt_mask = batch[f"{prefix}prompt_ids"], batch[f"{prefix}prompt_mask"]
    is_target = batch["completion_mask"] * batch.get("tool_mask", 1)
    is_target = torch.cat([torch.zeros_like(prompt_mask), is_target], 1)
    mask = torch.cat([prompt_mask, batch["completion_mask"]], 1)
    ids = torch.cat([prompt_ids, batch["completion_ids"]], 1)
    token_fields = {} if prefix else {name: batch[name] for name in TOKEN_FIELDS if name in batch}
    mask, ids, is_target, *token_types = flush_left(mask, ids, is_target, *token_fields.values())
    labels = ids.masked_fill(is_target == 0, IGNORE_INDEX)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return rows | dict(zip(token_fields, token_types, strict=True))
