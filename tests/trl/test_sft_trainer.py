"""`DistillSFTTrainer`: TRL's rows under the library's objective, and TRL itself where nothing is distilled."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import build, conversation
from torch._dynamo.utils import counters
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    masking_utils,
)
from trl import SFTConfig, SFTTrainer

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.data import Collator, tokenize_dataset, training_template
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer, OnPolicyDistillConfig, OnPolicyDistillTrainer

GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN = [{"name": "hidden_mse", "weight": 0.1}, {"name": "value_relation", "weight": 0.1}]


ROWS = {
    "messages": [{"messages": conversation(i)} for i in range(12)],
    "prompt-completion": [{"prompt": conversation(i)[:1], "completion": conversation(i)[1:]} for i in range(12)],
    "text": [{"text": conversation(i)[1]["content"]} for i in range(12)],
    "tokenised": [{"input_ids": list(range(9 + i)), "labels": [-100] * i + list(range(i, 9 + i))} for i in range(12)],
    "formatted": [{"question": f"What is {i}?"} for i in range(12)],
}


@pytest.fixture
def make_sft(tmp_path, smollm2_tokenizer):
    """`make_sft("messages", packing=True)`: a trainer of a tiny pair with SmolLM2's vocabulary."""
    size = len(smollm2_tokenizer)

    def make(rows="messages", *, cls=DistillSFTTrainer, config=DistillSFTConfig, folder="out", **options):
        passed = {k: options.pop(k) for k in list(options) if k not in DistillSFTConfig.__dataclass_fields__}
        fields = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"} | options
        args = config(str(tmp_path / folder), bf16=False, report_to="none", dataloader_pin_memory=False, **fields)
        data = Dataset.from_list(ROWS[rows] if isinstance(rows, str) else rows)
        arguments = {"model": build("llama", 0, vocab=size, width=16), "processing_class": smollm2_tokenizer}
        if cls is DistillSFTTrainer:
            arguments["teacher"] = build("llama", 1, layers=3, width=24, vocab=size)
        return cls(args=args, train_dataset=data, eval_dataset=data.select(range(5)), **arguments | passed)

    return make


def losses(trainer, *names):
    trainer.train()
    names = names or ("loss", "grad_norm")
    return [tuple(log[name] for name in names) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_keep_their_weights_and_origins(make_sft, padding_free):
    """They are compared with rows of `tokenize_dataset` in `DistillTrainer`."""
    texts = [{"prompt": f"What is {i}?", "completion": f" It is {'very ' * (i % 3)}close to {i}."} for i in range(12)]
    values = [{"weight": i / 4, "origin": ("teacher", "student", "data")[i % 3]} for i in range(12)]
    rows = [text | value for text, value in zip(texts, values, strict=True)]
    options = dict(max_steps=1, per_device_train_batch_size=12, by_origin={"student": {"divergence": "reverse_kl"}})
    trainer = make_sft(rows, padding_free=padding_free, max_length=None, **options)
    trainer.train()
    data = tokenize_dataset(Dataset.from_list(rows), trainer.processing_class, 64)
    config = DistillConfig(trainer.args.output_dir + "-plain", report_to="none", logging_steps=1, **options)
    size = len(trainer.processing_class)
    plain = DistillTrainer(
        build("llama", 0, vocab=size, width=16), config, teacher=build("llama", 1, layers=3, width=24, vocab=size),
        train_dataset=data, data_collator=Collator(0),
    )  # fmt: skip
    plain.train()
    for name in ("loss", "soft_loss_origin_student", "hard_loss_origin_teacher"):
        assert trainer.state.log_history[0][name] == pytest.approx(plain.state.log_history[0][name], rel=1e-5), name


def test_packing_of_trl_refuses_weights_that_it_would_lose(make_sft):
    with pytest.raises(DistillError, match="train_dataset has weight, which SFTTrainer's packing leaves out"):
        make_sft([row | {"weight": 1.0} for row in ROWS["messages"]], packing=True, max_length=64)


@pytest.mark.parametrize(("how", "packing"), [("no teacher", True), ("alpha 0", False)])
def test_without_distillation_it_equals_sft_trainer_bit_for_bit(make_sft, how, packing):
    common = dict(packing=packing, max_length=64, gradient_accumulation_steps=2)
    plain = make_sft(cls=SFTTrainer, config=SFTConfig, **common)
    ours = make_sft(**common, **({"teacher": None} if how == "no teacher" else {"alpha": 0.0}))
    names = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")
    assert losses(ours, *names) == losses(plain, *names)
    metrics, expected = ours.evaluate(), plain.evaluate()
    assert metrics.keys() == expected.keys()
    assert (metrics["eval_loss"], metrics["eval_entropy"]) == (expected["eval_loss"], expected["eval_entropy"])
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())


CASES = {
    "messages": {},
    "prompt-completion": {},
    "text": {"losses": HIDDEN},
    "tokenised": {"divergence": "js", "alpha": 1.0},
    "formatted": {"formatting_func": lambda row: row["question"] + " Nothing."},
}


@pytest.mark.parametrize("rows", ROWS)
def test_the_rows_that_trl_prepares_have_the_loss_of_distill_trainer(make_sft, tmp_path, smollm2_tokenizer, rows):
    ours = make_sft(rows, gradient_accumulation_steps=2, **CASES[rows])
    options = {k: v for k, v in CASES[rows].items() if k != "formatting_func"}
    plain = DistillTrainer(
        model=build("llama", 0, vocab=len(smollm2_tokenizer), width=16),
        teacher=build("llama", 1, layers=3, width=24, vocab=len(smollm2_tokenizer)),
        args=DistillConfig(
            str(tmp_path / "plain"),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=ours.args.learning_rate,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=ours.train_dataset.select_columns(["input_ids", "labels"]),
        data_collator=ours.data_collator,
        processing_class=smollm2_tokenizer,
    )
    for results, expected in zip(losses(ours), losses(plain), strict=True):
        assert results == pytest.approx(expected, rel=1e-6)


def test_assistant_only_loss_has_only_assistant_tokens_as_targets(make_sft, smollm2_tokenizer, monkeypatch):
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", GENERATION)
    trainer = make_sft(assistant_only_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert smollm2_tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "It is close to 0.<|im_end|>"
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0


def step_on_all_rows(make_sft, **options):
    """Loss and gradient of one step over all rows."""
    common = dict(max_steps=1, per_device_train_batch_size=12, optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
    trainer = make_sft(losses=HIDDEN, folder="-".join(options), **common, **options)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    (results,) = losses(trainer, "loss", "soft_loss", "hidden_mse_loss", "value_relation_loss")
    return results, before - trainer.model.model.layers[0].mlp.up_proj.weight.detach()


def test_the_training_template_gives_trl_the_targets_of_a_recipe(make_sft, smollm2_tokenizer, monkeypatch):
    tokenized = tokenize_dataset(Dataset.from_list(ROWS["messages"]), smollm2_tokenizer, 1024)
    with pytest.raises(ValueError, match="chat template"):
        make_sft(assistant_only_loss=True)
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", training_template("smollm2"))
    trainer = make_sft(assistant_only_loss=True)
    for row, expected in zip(trainer.train_dataset, tokenized, strict=True):
        batch = trainer.data_collator([row])
        assert {name: batch[name][0].tolist() for name in expected} == expected


def test_packed_rows_have_the_loss_and_gradient_of_padded_rows(make_sft):
    padded, gradient = step_on_all_rows(make_sft, max_length=64)
    for options in ({"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}):
        packed, packed_gradient = step_on_all_rows(make_sft, **options)
        assert packed == pytest.approx(padded, rel=1e-6)
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("who", ["model", "teacher"])
def test_packing_is_refused_where_documents_see_each_other(make_sft, smollm2_tokenizer, who):
    leaking = BloomForCausalLM(BloomConfig(vocab_size=len(smollm2_tokenizer), hidden_size=16, n_layer=2, n_head=2))
    name = {"model": "student", "teacher": "teacher"}[who]
    with pytest.raises(DistillError, match=rf"in the {name} \(BloomForCausalLM\) a packed document attends to the one"):
        make_sft(packing=True, max_length=64, **{who: leaking})
    make_sft(packing=False, **{who: leaking})


def test_the_teacher_gets_the_positions_of_packed_rows(make_sft):
    trainer, recorded = make_sft(packing=True, max_length=64, max_steps=3), {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        recorded[name] = positions = []
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs, positions=positions: positions.append(kwargs.get("position_ids")),
            with_kwargs=True,
        )
    trainer.train()
    for student_positions, teacher_positions in zip(
        recorded["student"][-3:], recorded["teacher"][-3:], strict=True
    ):  # of three steps
        assert torch.equal(student_positions, teacher_positions)
        assert (student_positions == 0).sum() > 1


@pytest.mark.parametrize("trains", [True, False])
def test_packed_attention_is_checked_once_after_the_models_are_prepared(make_sft, packing_events, trains):
    """Flash attention does not run on a CPU, where the student may be until then."""
    trainer = make_sft(packing=True, max_length=64, eval_packing=True)
    assert packing_events == []
    if trains:
        trainer.train()
    trainer.evaluate()
    assert packing_events.count("student") == packing_events.count("teacher") == 1
    assert "prepare" in packing_events[: packing_events.index("student")]


def test_documents_that_see_each_other_are_refused_before_the_first_step(make_sft, monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    trainer = make_sft(packing=True, max_length=64)
    with pytest.raises(DistillError, match=r"packing: in the student \(LlamaForCausalLM\) .* 'sdpa'"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_lora_student_starts_at_the_loss_of_its_base_and_trains_its_adapter(make_sft, tmp_path, targets):
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    trainer = make_sft(peft_config=config, learning_rate=0.01)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    results = losses(trainer)
    assert results[0][0] == pytest.approx(losses(make_sft(folder="whole"))[0][0], rel=1e-6)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert any("lm_head" in name for name in moved) == ("lm_head" in targets)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_peft_need_not_be_installed(make_sft, monkeypatch):
    """Without it TRL's module lacks the name."""
    import trl.trainer.sft_trainer

    monkeypatch.delattr(trl.trainer.sft_trainer, "BaseTunerLayer")
    monkeypatch.setattr(trl.trainer.sft_trainer, "is_peft_available", lambda: False)
    monkeypatch.setattr(trl.trainer.sft_trainer, "is_peft_model", lambda model: False)
    assert make_sft().is_distilling


def test_without_distilling_an_adapter_on_the_head_is_refused_as_by_trl(make_sft):
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_sft(peft_config=config, alpha=0.0)


def test_student_and_teacher_are_loaded_by_path(make_sft, smollm2_tokenizer, tmp_path):
    for role, seed in (("student", 0), ("teacher", 1)):
        build("llama", seed, vocab=len(smollm2_tokenizer), width=16).save_pretrained(tmp_path / role)
        smollm2_tokenizer.save_pretrained(tmp_path / role)
    trainer = make_sft(
        model=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        processing_class=None,
        model_init_kwargs={"dtype": "bfloat16"},
        teacher_init_kwargs={"dtype": "bfloat16"},
    )
    assert (trainer.model.dtype, trainer.teacher.model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert all(loss > 0 for loss, _ in losses(trainer))


def test_plain_sft_config_distils_with_the_defaults(make_sft):
    plain = make_sft(config=SFTConfig)
    assert [(t.name, t.weight, t.temperature_squared) for t in plain.distiller.terms] == [
        ("soft", 0.5, 4.0),
        ("hard", 0.5, 1.0),
    ]
    assert losses(plain) == losses(make_sft(folder="own"))


def test_evaluation_and_training_keep_the_names_of_trls_metrics(make_sft):
    trainer = make_sft()
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    losses(trainer)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(0 <= log["mean_token_accuracy"] <= 1 and log["entropy"] == log["student_entropy"] for log in logs)
    assert 0 < logs[0]["num_tokens"] < logs[1]["num_tokens"] < logs[2]["num_tokens"] < tokens
    assert {"eval_kl", "eval_perplexity", "eval_mean_token_accuracy", "eval_entropy"} <= trainer.evaluate().keys()


def test_compute_metrics_sees_the_logits_of_all_positions(make_sft):
    trainer = make_sft(compute_metrics=lambda p: {"shape": float(p.predictions.shape[-1]), "rows": len(p.label_ids)})
    metrics = trainer.evaluate()
    assert (metrics["eval_shape"], metrics["eval_rows"]) == (49152, 5)


def test_a_resumed_run_equals_an_uninterrupted_run(make_sft, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, losses=HIDDEN, packing=True, max_length=64)
    options["per_device_train_batch_size"] = 1
    straight, resumed = make_sft(**options), make_sft(**options)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_compiled_blocks_train_as_uncompiled_ones_do(make_sft):
    """Packed rows have other lengths and numbers of documents in each step; a graph with dynamic shapes covers them."""
    options = dict(packing=True, max_length=64, per_device_train_batch_size=1, max_steps=6)
    plain = losses(make_sft(**options))
    torch._dynamo.reset()
    compiled = make_sft(**options, torch_compile_backend="eager", compile_teacher=True)
    counters.clear()
    assert losses(compiled) == plain
    assert 2 <= counters["frames"]["ok"] <= 4
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, "loss_type='dft' rewrites the cross entropy"),
        ({"loss_type": "dft", "eval_packing": True}, "loss_type='dft'.*; eval_packing=True without padding-free"),
        ({"torch_compile_backend": "eager", "losses": HIDDEN}, "torch_compile does not work with hidden_mse"),
        ({"config": DistillConfig}, "args is a DistillConfig.*use DistillSFTConfig"),
        ({"teacher": None, "losses": HIDDEN}, "`losses` are set but there is no teacher"),
    ],
)
def test_unsupported_arguments_are_refused_with_the_reason(make_sft, options, message):
    with pytest.raises(DistillError, match=message):
        make_sft(**options)


def test_liger_layers_and_label_smoothing_are_honoured(make_sft):
    with pytest.warns(FutureWarning, match="deprecated in `SFTTrainer`|use_liger_kernel"):
        trainer = make_sft(use_liger_kernel=True, label_smoothing_factor=0.1)
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}
    assert trainer.distiller.terms[1].options == {"label_smoothing": 0.1}


def test_prompt_learning_is_refused(make_sft):
    from peft import PromptTuningConfig

    with pytest.raises(DistillError, match="prompt learning"):
        make_sft(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_every_field_can_be_set_from_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--packing", "true", "--alpha", "0.7", "--teacher_init_kwargs"]
    words += ['{"dtype": "bfloat16"}', "--divergence", '{"name": "js", "beta": 0.2}', "--bf16", "false"]
    (config,) = HfArgumentParser(DistillSFTConfig).parse_args_into_dataclasses(words)
    assert (config.packing, config.alpha, config.max_length, config.learning_rate) == (True, 0.7, 1024, 2e-5)
    assert (config.teacher_init_kwargs, config.divergence) == ({"dtype": "bfloat16"}, {"name": "js", "beta": 0.2})


def test_without_trl_the_import_names_the_command(monkeypatch):
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("hf_distill.trl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DistillError, match=r'pip install "hf-distill\[trl\]"'):
        importlib.import_module("hf_distill.trl")


@pytest.mark.parametrize("cls", ["sft", "on-policy"])
def test_a_command_line_of_trl_names_the_teacher(tmp_path, smollm2_tokenizer, cls):
    folder = tmp_path / "teacher"
    build("llama", 1, vocab=len(smollm2_tokenizer), width=16).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    words = ["--output_dir", str(tmp_path / "out"), "--teacher_model_name_or_path", str(folder), "--bf16", "false"]
    words += ["--teacher_model_init_kwargs", '{"dtype": "float64"}', "--report_to", "none", "--use_cpu", "true"]
    rows = Dataset.from_list([{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(4)])
    config, trainer_class = (
        (DistillSFTConfig, DistillSFTTrainer) if cls == "sft" else (OnPolicyDistillConfig, OnPolicyDistillTrainer)
    )
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses(words)
    student = build("llama", 0, vocab=len(smollm2_tokenizer), width=16)
    trainer = trainer_class(model=student, args=args, train_dataset=rows, processing_class=smollm2_tokenizer)
    assert trainer.teacher.model.dtype == torch.float64
    with pytest.raises(DistillError, match="was given teacher='other' and teacher_model_name_or_path="):
        trainer_class(student, args, teacher="other", train_dataset=rows, processing_class=smollm2_tokenizer)


def test_a_mixture_of_experts_logs_what_its_router_adds(make_sft):
    config = MixtralConfig(vocab_size=49152, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, intermediate_size=16, num_local_experts=4)  # fmt: skip
    trainer = make_sft(model=MixtralForCausalLM(config), max_steps=1, router_aux_loss_coef=0.5, alpha=0.5)
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "aux_loss" in log)
    assert log["loss"] == pytest.approx(0.5 * (log["soft_loss"] + log["hard_loss"]) + log["aux_loss"], rel=1e-5)
    assert log["aux_loss"] > 0.5  # the load balancing of two experts a token is 2 where it is even
