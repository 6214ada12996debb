"""Ranges of the numeric fields of transformers.TrainingArguments, which does not define them itself."""

from typing import TypedDict


class Range(TypedDict, total=False):
    """Arguments of pydantic.Field."""

    ge: float
    gt: float
    le: float
    lt: float


_MAX_BATCH_ROWS = 2**20
_SEED: Range = {"ge": 0, "lt": 2**32}  # the range of numpy's seeds
_COUNT: Range = {"ge": 1, "lt": 2**31}
_SHARE: Range = {"ge": 0, "lt": 1}

# Every numeric field has a range (see tests/recipe/test_values.py).
RANGES: dict[str, Range] = {
    "per_device_train_batch_size": {"ge": 1, "le": _MAX_BATCH_ROWS},
    "per_device_eval_batch_size": {"ge": 1, "le": _MAX_BATCH_ROWS},
    "gradient_accumulation_steps": _COUNT,
    "num_train_epochs": {"gt": 0, "le": 10**6},
    "max_steps": {"ge": -1, "lt": 2**53},
    "learning_rate": {"ge": 0, "le": 10**6},
    "warmup_steps": {"ge": 0, "lt": 2**53},
    "weight_decay": {"ge": 0},
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": {"ge": 0},
    "max_grad_norm": {"ge": 0},
    "label_smoothing_factor": {"ge": 0, "le": 1},
    "neftune_noise_alpha": {"ge": 0},
    "torch_empty_cache_steps": _COUNT,
    "logging_steps": {"gt": 0, "lt": 2**53},
    "eval_steps": {"gt": 0, "lt": 2**53},
    "eval_delay": {"ge": 0, "lt": 2**53},
    "eval_accumulation_steps": _COUNT,
    "save_steps": {"gt": 0, "lt": 2**53},
    "save_total_limit": {"ge": 0, "lt": 2**31},
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": {"ge": 0, "le": 4096},
    "dataloader_prefetch_factor": {"ge": 1, "le": 2**16},
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "local_rank": {"ge": -1, "lt": 2**31},
    "max_consecutive_nonfinite_steps": _COUNT,
    "chunk_tokens": _COUNT,
    "early_stopping_patience": _COUNT,
}
# Fields that hold a share of all steps (below 1) or a number of steps (from 1).
SHARES_OR_STEPS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps")
