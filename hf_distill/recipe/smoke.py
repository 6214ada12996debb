"""Smoke runs: a recipe with tiny random models, packaged text and a few steps, which downloads nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.json_types import JSON, JSONObject
from ..core.references import SMOKE_PREFIX, is_file
from ..errors import DistillError
from .generation import SERVER_OPTIONS
from .schema import Recipe
from .tasks import TASKS, TaskKeys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEACHER_DEPTH = 4
SMOKE_PARAMETERS = 110_000  # of about 180,000 that the tiny teacher has
_SMOKE_WIDTHS: JSONObject = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_experts": 2,
}
_GROUP_SIZE = 16  # of quantized weights; it divides the widths of the tiny models and of those pruned from them
_OTHER_TOKENIZER = "other-tokenizer-teacher"  # role of a teacher with another tokenizer than the student
# Merges of its tokenizer: frequent pairs of letters (the first character is the space of a byte-level tokenizer).
_MERGES = (
    ("\u0120", "t"),
    ("h", "e"),
    ("\u0120", "a"),
    ("i", "n"),
    ("r", "e"),
    ("\u0120t", "he"),
    ("o", "n"),
    ("e", "r"),
)
# Part of a model id -> model_type. The first match is used.
_FAMILIES = {
    "smollm3": "smollm3",
    "smollm": "llama",
    "llama": "llama",
    "qwen3": "qwen3",
    "qwen": "qwen2",
    "mistral": "mistral",
    "gemma-3": "gemma3_text",
    "gemma": "gemma2",
    "gpt2": "gpt2",
    "pythia": "gpt_neox",
    "olmo": "olmo2",
    "phi": "phi3",
}


def family_of(reference: str) -> str:
    """Return the model_type of a model: from a local config, else from its name, else llama."""
    config = Path(reference) / "config.json"
    if is_file(config):
        try:
            return str(json.loads(config.read_text())["model_type"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DistillError(f"{config} is not the config of a model: {error}") from None
    return next((kind for word, kind in _FAMILIES.items() if word in reference.lower()), "llama")


def smoke_values(recipe: Recipe) -> JSONObject:
    """Return the values of a recipe reduced to a smoke run. Values that do not affect the size are kept."""
    values = recipe.model_dump(exclude_unset=True)
    if recipe.task in TASKS:
        return _task_smoke_values(values, TASKS[recipe.task])
    student, train = values["student"], values["train"]
    teacher_model = recipe.primary_teacher.loaded_model
    role = _OTHER_TOKENIZER if recipe.is_cross_tokenizer else "teacher"
    for teacher in [values["teacher"]] if values.get("teacher") else values["teachers"]:
        _shrink_teacher(teacher, f"{train['output_dir']}-smoke/cache", family_of(str(student.get("model"))), role)
    _shrink_student(student)
    for i, stage in enumerate(values.get("stages", ())):
        is_teacher = stage["student"].get("model") == teacher_model  # a first stage that adapts the teacher
        _shrink_student(stage["student"], max(_TEACHER_DEPTH - 1 - i, 1), is_teacher)
        stage["train"] = {key: value for key, value in stage.get("train", {}).items() if key == "learning_rate"}
    if values.get("stages"):
        values["student"] = values["stages"][-1]["student"]
    _shrink_losses(values)
    text, length = "package:pydoc_data.topics", 64
    teachers = [values["teacher"]] if values.get("teacher") else values["teachers"]
    prompted = [teacher for teacher in teachers if teacher.get("prompt")]
    for teacher in prompted:  # the columns of another template may not exist, and it may fill a row of bytes
        teacher["prompt"] = "Note: {prompt}"
    if recipe.data.generated:
        values["generate"] = values.get("generate") or {}
    if (generate := values.get("generate")) is not None:
        _shrink_generation(generate)
    if values.get("on_policy") or prompted or generate is not None:
        text, length = "package:builtins", 128
    if values.get("on_policy"):
        values["on_policy"] |= {"max_completion_length": 8, "vllm": None}
    values["data"].pop("chat_template", None)  # with the byte-level tokenizer, a rendered template would fill a row
    values["data"] = {name: _shrink_data(name, part, text) for name, part in values["data"].items()} | {
        "max_length": length
    }
    _shrink_train(train)
    return values


def _shrink_generation(generate: dict[str, Any]) -> None:
    """Reduce a generation to a few short completions of the tiny teacher, which needs no server."""
    removed = ("output_dir", "batching", "chat_template_kwargs", "filters", "select")  # filters: all text is random
    for name in (*SERVER_OPTIONS, *removed):
        generate.pop(name, None)
    generate |= {"backend": "transformers", "max_new_tokens": 8, "max_prompts": 8, "batch_size": 4}


def _task_smoke_values(values: dict[str, Any], task: TaskKeys) -> JSONObject:
    """Return the values of a recipe of another task than text-generation reduced to a smoke run."""
    student = values["student"]
    if isinstance(cut := student.get("from_teacher"), dict):
        student["from_teacher"] = _shrink_cut(cut, 2, [0, _TEACHER_DEPTH - 1])
    if student.get("model"):
        student |= {"model": f"{SMOKE_PREFIX}{task.family}/{'teacher' if cut else 'student'}", "revision": None}
    for teacher in [values["teacher"]] if values.get("teacher") else values["teachers"]:
        _shrink_teacher(teacher, "", task.family, "teacher", task.family)
    _shrink_losses(values)
    values["data"] = {
        name: _shrink_data(name, part, task.smoke_data)
        for name, part in values["data"].items()
        if name not in ("columns", "language", "max_length")
    }
    if task.reads_text:
        values["data"]["max_length"] = 128
    _shrink_train(values["train"])
    return values


def _shrink_losses(values: dict[str, Any]) -> None:
    for loss in values.get("losses", ()):
        if isinstance(loss.get("layers"), list):
            loss["layers"] = "stretch"
        elif str(loss.get("layers")).startswith("last:"):
            loss["layers"] = "last:1"


def _shrink_train(train: dict[str, Any]) -> None:
    removed = ("num_train_epochs", "warmup_steps", "eval_steps", "bf16", "fp16", "optim", "dataloader_num_workers")
    for key in removed:
        train.pop(key, None)
    train |= {"output_dir": f"{train['output_dir']}-smoke", "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    train |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "push_to_hub": False}


def _shrink_student(student: JSONObject, depth: int = _TEACHER_DEPTH - 1, is_teacher: bool = False) -> None:
    if isinstance(cut := student.get("from_teacher"), dict):
        student["from_teacher"] = cut = _shrink_cut(cut, depth, [0, 1, 3])
    if isinstance(model := student.get("model"), str):
        role = "teacher" if cut or is_teacher else "student"
        student |= {"model": f"{SMOKE_PREFIX}{family_of(model)}/{role}", "revision": None}
    if isinstance(quantize := student.get("quantize"), dict) and quantize["scheme"] != "nvfp4":
        quantize["group_size"] = _GROUP_SIZE


def _shrink_cut(cut: JSONObject, depth: int, layers: list[int]) -> JSONObject:
    """Reduce what a student keeps of its teacher to what the tiny teacher has; see `build_tiny`.

    Args:
        cut: Values of `from_teacher`.
        depth: Number of layers in place of `keep_layers`.
        layers: Indices of layers in place of those of the recipe.
    """
    sizes: JSONObject = {"keep_layers": depth, "calibration_rows": 2, "target_parameters": SMOKE_PARAMETERS}
    for name in ("layers", "decoder_layers", "encoder_layers"):
        sizes[name] = [*layers]
    sizes |= _SMOKE_WIDTHS | {"vocab": {"keep": "used"}}
    return {name: sizes.get(name, value) for name, value in cut.items() if value is not None}


def _shrink_teacher(teacher: JSONObject, cache: str, family: str, role: str, model_family: str | None = None) -> None:
    """Reduce a teacher to a tiny random model.

    Args:
        teacher: Values of the teacher, which are changed.
        cache: Folder of its cache.
        family: Family of the student, which the teacher has if the recipe does not name its model.
        role: Role of the tiny model.
        model_family: Family of the tiny model. None: that of the model that the recipe names.
    """
    teacher.pop("tokenizer", None)
    if teacher.get("kind") == "remote":  # a smoke run needs no server: the tiny teacher is a local model
        for name in [name for name in teacher if name not in ("name", "weight", "sources")]:
            del teacher[name]
        teacher |= {"kind": "frozen", "model": f"{SMOKE_PREFIX}{family}/{role}"}
    if isinstance(model := teacher.get("model"), str) and not model.startswith(SMOKE_PREFIX):
        teacher |= {"model": f"{SMOKE_PREFIX}{model_family or family_of(model)}/{role}", "revision": None}
    if teacher.get("interval_steps"):
        teacher["interval_steps"] = 2
    if isinstance(source := teacher.get("source"), dict):
        _shrink_teacher(source, "", family, role)
    if teacher.get("path"):
        teacher |= {"path": cache} if teacher.get("kind") == "cached" else {"path": None, "interval_steps": 2}


def _shrink_data(name: str, part: JSON, text: str) -> JSON:
    """Reduce one entry of `data`: a source becomes a packaged text with the same weight."""
    if name == "eval":
        return {"holdout": 0.1, "max_rows": 4}
    if not isinstance(part, dict):
        return part
    return {"path": text} | {key: part[key] for key in ("weight", "generate", "origin") if key in part}


def build_tiny(reference: str, folder: Path) -> None:
    """Write the tiny random language model `smoke:family/role` and a byte-level tokenizer into a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    family, _, role = reference.removeprefix(SMOKE_PREFIX).partition("/")
    width, depth = (32, 2) if role == "student" else (64, _TEACHER_DEPTH)
    tokenizer = byte_tokenizer(_MERGES if role == _OTHER_TOKENIZER else ())
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> "PreTrainedTokenizerFast":
    """Return a byte-level tokenizer with an end-of-text and a padding token; its template marks assistant turns.

    Args:
        merges: Pairs of tokens that become one token; none: each byte is a token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[*merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    fast_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast_tokenizer.chat_template = _TEMPLATE
    return fast_tokenizer


_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
