"""Private names of other libraries that this package uses, apart from the overridden methods in `trainer/upstream.py`.

Each has the object that defines it, its parameters if it is called or overridden, and what depends on it.
"""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class PrivateName:
    """A private name of a library.

    owner:      class or module that defines the name, as `package.module.Class`
    name:       the name
    use:        what this package does with it
    parameters: names of the parameters after `self`; None for an attribute
    """

    owner: str
    name: str
    use: str
    parameters: tuple[str, ...] | None = None

    def find_owner(self) -> object:
        """Import and return the owner."""
        try:
            return import_module(self.owner)
        except ModuleNotFoundError:
            module, _, attribute = self.owner.rpartition(".")
            return getattr(import_module(module), attribute)


_GENERATION = "transformers.generation.utils.GenerationMixin"
_BATCHING = "transformers.generation.continuous_batching"
_TEMPLATES = "transformers.utils.chat_template_utils"
_MODULE = "torch.nn.modules.module.Module"
_FSDP = "torch.distributed.fsdp._fully_shard"

NAMES = [
    # transformers.Trainer
    PrivateName("transformers.Trainer", "_get_learning_rate", "logs the learning rate of a step", ()),
    PrivateName("transformers.Trainer", "_get_output_dir", "finds the checkpoints of a run", ("trial",)),
    PrivateName("transformers.Trainer", "_load_rng_state", "resumes with the random numbers of a run", ("checkpoint",)),
    PrivateName("transformers.Trainer", "_signature_columns", "keeps the columns of teacher and collator"),
    PrivateName("transformers.Trainer", "_created_lr_scheduler", "finds a scheduler that the user passed"),
    PrivateName("transformers.Trainer", "_initial_global_step", "averages the loss over the steps that were taken"),
    PrivateName("transformers.Trainer", "_tr_loss", "removes losses of skipped steps"),
    PrivateName("transformers.Trainer", "_total_loss_scalar", "averages the loss over the steps that were taken"),
    PrivateName("transformers.TrainingArguments", "_n_gpu", "prevents DataParallel for a teacher with several devices"),
    PrivateName("transformers.TrainingArguments", "_VALID_DICT_FIELDS", "parses dictionaries of options as JSON"),
    # TRL
    PrivateName("trl.SFTTrainer", "_is_vlm", "recognizes models of images"),
    PrivateName("trl.SFTTrainer", "_tp_size", "counts the tokens of ranks with tensor parallelism"),
    PrivateName("trl.SFTTrainer", "_total_train_tokens", "logs the number of tokens"),
    PrivateName("trl.DistillationTrainer", "_is_vlm", "recognizes models of images"),
    PrivateName("trl.DistillationTrainer", "_buffered_inputs", "generates once for several steps"),
    PrivateName("trl.DistillationTrainer", "_metrics", "logs the metrics of generation"),
    PrivateName("trl.DistillationTrainer", "_step", "knows when to generate again"),
    PrivateName("trl.DistillationTrainer", "_tokenizer", "decodes and pads completions"),
    PrivateName("trl.DistillationTrainer", "_tokenize_prompts", "tokenizes prompts of rows", ("prompts",)),
    # transformers: models and configs
    PrivateName("transformers.PreTrainedModel", "_keys_to_ignore_on_save", "compares weights with a checkpoint"),
    PrivateName("transformers.PreTrainedModel", "_supports_flash_attn", "knows which inputs reach the attention"),
    PrivateName("transformers.PreTrainedModel", "_tp_size", "recognizes tensor parallelism"),
    PrivateName("transformers.PreTrainedModel", "_loss_function", "finds the loss of a model"),
    PrivateName("transformers.core_model_loading", "_weight_conversions", "writes weights in the checkpoint's format"),
    PrivateName("transformers.PretrainedConfig", "_attn_implementation", "knows the kind of attention"),
    PrivateName("transformers.PretrainedConfig", "_attn_implementation_internal", "refuses remote kernels"),
    PrivateName("transformers.PretrainedConfig", "_experts_implementation", "chooses experts that can be inspected"),
    PrivateName("transformers.PretrainedConfig", "_experts_implementation_internal", "refuses remote kernels"),
    PrivateName("transformers.PretrainedConfig", "_name_or_path", "compares configs of processors"),
    PrivateName("transformers.models.auto.auto_factory", "_BaseAutoModelClass", "types of Auto classes"),
    PrivateName("transformers.models.auto.auto_factory", "_model_mapping", "finds the Auto classes of a model"),
    PrivateName("transformers.T5ForConditionalGeneration", "_shift_right", "makes decoder inputs", ("input_ids",)),
    PrivateName("transformers.HubertModel", "_get_feat_extract_output_lengths", "counts frames of a sound"),
    PrivateName(
        "transformers.models.granite_speech5.modeling_granite_speech5",
        "_get_subsampling_output_length",
        "counts frames",
    ),
    # transformers: generation
    PrivateName(
        _GENERATION,
        "_prefill",
        "reads the prompts of a padded batch",
        ("input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
    ),
    PrivateName(_GENERATION, "_optimize_model_for_decode", "generates a padded batch", ()),
    PrivateName(
        _GENERATION,
        "_update_model_kwargs_for_generation",
        "generates a padded batch",
        ("outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"),
    ),
    PrivateName(_GENERATION, "_supports_logits_to_keep", "refuses hidden states of continuous batching", ()),
    PrivateName(_GENERATION, "_pad_token_tensor", "pads completions of a batch"),
    PrivateName(
        f"{_BATCHING}.requests.RequestState",
        "update_and_check_completion",
        "ends a request one step later, to record its last distribution",
        ("token_id", "logprob"),
    ),
    PrivateName(
        f"{_BATCHING}.cb_logits_processors.ContinuousBatchingLogitsProcessor",
        "fill_defaults",
        "records distributions of continuous batching",
        ("int32_tensor",),
    ),
    PrivateName(
        f"{_BATCHING}.cb_logits_processors.ContinuousBatchingLogitsProcessor",
        "prepare_tensor_args",
        "records distributions of continuous batching",
        ("requests_with_new_token",),
    ),
    # transformers: chat templates, DeepSpeed
    PrivateName(_TEMPLATES, "_compile_jinja_template", "renders chat templates", ("chat_template",)),
    PrivateName(_TEMPLATES, "_get_template_variables", "finds unknown template variables", ("chat_template",)),
    PrivateName(
        "transformers.integrations.deepspeed",
        "_hf_deepspeed_config_weak_ref",
        "loads a teacher with its own DeepSpeed config",
    ),
    # accelerate, datasets
    PrivateName("accelerate.hooks", "_hf_hook", "recognizes offloaded and dispatched models"),
    PrivateName("accelerate.hooks", "_old_forward", "finds the forward below a hook"),
    PrivateName("datasets.Dataset", "_indices", "names the row of the original data set in errors"),
    # torch
    PrivateName(_MODULE, "_modules", "attaches the sidecar"),
    PrivateName(_MODULE, "_buffers", "finds buffers"),
    PrivateName(_MODULE, "_parameters", "finds weights"),
    PrivateName(_MODULE, "_forward_hooks", "recognizes a hook on the output head"),
    PrivateName(_MODULE, "_forward_pre_hooks", "leaves hooks out of a copy of the MTP heads"),
    PrivateName(_MODULE, "_backward_hooks", "leaves hooks out of a copy of the MTP heads"),
    PrivateName(_MODULE, "_non_persistent_buffers_set", "finds buffers that are saved"),
    PrivateName(_MODULE, "_compiled_call_impl", "recognizes compiled modules"),
    PrivateName("torch._dynamo.eval_frame", "_orig_mod", "finds the model in a compiled one"),
    PrivateName("torch._dynamo.eval_frame", "_torchdynamo_orig_callable", "recognizes a compiled forward"),
    PrivateName("torch._dynamo", "OptimizedModule", "recognizes compiled models"),
    PrivateName("torch.utils._pytree", "tree_leaves", "finds tensors in outputs", ("tree", "is_leaf")),
    PrivateName("torch._C", "DisableTorchFunction", "calls torch below a mode"),
    PrivateName("torch", "_foreach_lerp_", "updates averages of weights"),
    PrivateName("torch.distributed.distributed_c10d", "_get_default_store", "exchanges heartbeats of ranks", ()),
    PrivateName("torch.nn.modules.batchnorm", "_BatchNorm", "finds normalization over batches"),
    PrivateName("torch.nn.modules.dropout", "_DropoutNd", "finds dropout"),
    PrivateName("torch.nn.modules.module", "_IncompatibleKeys", "returns what was not loaded"),
    PrivateName("torch.distributed.fsdp.FSDPModule", "_get_fsdp_state", "keeps the output head gathered", ()),
    PrivateName(f"{_FSDP}._fsdp_state", "_auto_reshard_after_forward", "keeps the output head gathered"),
    PrivateName(f"{_FSDP}._fsdp_state", "_fsdp_param_groups", "keeps the output head gathered"),
    PrivateName(f"{_FSDP}._fsdp_param", "_module_info", "keeps the output head gathered"),
    # command line and server
    PrivateName("rich.console.Console", "_width", "prints wide tables in files"),
    PrivateName("typer", "_click", "types of commands"),
    PrivateName("uvicorn.Server", "_captured_signals", "ends the server without a second signal"),
]
