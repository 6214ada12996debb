"""Methods of transformers and TRL that this package overrides and relies on, with their expected parameters.

If such a method were renamed, nothing would call the override, and training would silently use another objective.
Therefore the classes are compared with this list when they are imported.
"""

import inspect
from collections.abc import Mapping
from importlib.metadata import version

from packaging.requirements import Requirement

from ..errors import DistillError

SUPPORTED = {"transformers": "transformers>=5.23.0,<5.25", "trl": "trl>=1.16.0,<1.17"}

TRAINER = {
    "_clip_grad_norm": ("model",),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_hp_search_setup": ("trial",),
    "_inner_training_loop": ("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_set_signature_columns_if_needed": (),
}
SEQ2SEQ_TRAINER = {
    # It calls `model(**inputs)` for the loss and `self.model.generate` for the ids.
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys", "gen_kwargs"),
}
DISTILLATION_TRAINER = {
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "has_tool_images"),
    "_prepare_inputs": ("generation_batch",),
    "_set_signature_columns_if_needed": (),
}


def check_upstream(package: str, base: type, expected: Mapping[str, tuple[str, ...]]) -> None:
    """Check that the methods of a class of transformers or TRL are those that the overrides were written for.

    Args:
        package: "transformers" or "trl".
        base: the class whose methods are overridden.
        expected: method -> names of its parameters after `self`.

    Raises:
        DistillError: the installed version is not supported, or a method is missing or takes other parameters.
    """
    requirement, installed = Requirement(SUPPORTED[package]), version(package)
    problems = []
    if not requirement.specifier.contains(installed, prereleases=True):
        problems.append(f"{package} {installed} is installed")
    for name, parameters in expected.items():
        method = getattr(base, name, None)
        if method is None:
            problems.append(f"{base.__name__} has no method {name}")
        elif (actual := tuple(inspect.signature(method).parameters)[1:]) != parameters:
            problems.append(f"{base.__name__}.{name} takes {actual}, not {parameters}")
    if problems:
        raise DistillError(
            f"hf_distill overrides methods of {package} and supports {requirement}: {'; '.join(problems)}. "
            f'Install a supported version: pip install "{requirement}"'
        )
