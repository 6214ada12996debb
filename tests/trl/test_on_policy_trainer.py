"""`OnPolicyDistillTrainer`: TRL's generation, any objective, any share of the data set's completions."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from servers.teacher_servers import TOP_K, LocalTopK, VLLMServer
from tiny import build, conversation
from torch._dynamo.utils import counters
from transformers import HfArgumentParser, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.data import Collator, tokenize_examples
from hf_distill.generation.backends import row_dropping
from hf_distill.teachers import RemoteTeacher
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer, OnPolicyDistillConfig, OnPolicyDistillTrainer

ROWS = [{"prompt": conversation(i)[:1], "completion": conversation(i)[1:]} for i in range(12)]
TEXT = [{"prompt": f"What is {i}?", "completion": f" It is {'very ' * (i % 3)}close to {i}."} for i in range(12)]


@pytest.fixture
def make(tmp_path, smollm2_tokenizer):
    """`make(on_policy_fraction=0.5)`: a trainer of a tiny pair with SmolLM2's vocabulary."""
    size = len(smollm2_tokenizer)

    def make(rows=ROWS, *, cls=OnPolicyDistillTrainer, config=OnPolicyDistillConfig, folder="out", **options):
        passed = {k: options.pop(k) for k in list(options) if k not in config.__dataclass_fields__}
        fields = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
        fields |= {"bf16": False, "report_to": "none", "dataloader_pin_memory": False}
        if config in (OnPolicyDistillConfig, DistillationConfig):
            fields |= {"max_completion_length": 6, "learning_rate": 1e-3}
        args = config(str(tmp_path / folder), **fields | options)
        data = Dataset.from_list(rows)
        teacher = build("llama", 1, layers=3, width=24, vocab=size)
        return cls(
            args=args,
            **{
                "model": build("llama", 0, vocab=size, width=16),
                "teacher_model" if cls is DistillationTrainer else "teacher": teacher,
                "train_dataset": data,
                "eval_dataset": data.select(range(4)),
                "processing_class": smollm2_tokenizer,
            }
            | passed,
        )

    return make


def batches_of(trainer):
    """The batches that a run is trained on, as rows."""
    from hf_distill.trl.on_policy import _join_completions

    batches, compute_loss = [], trainer.compute_loss

    def record_batch(model, inputs, *more, **kwargs):
        batches.append(_join_completions(inputs) | {"items": inputs["num_items_in_batch"]})
        return compute_loss(model, inputs, *more, **kwargs)

    trainer.compute_loss = record_batch
    trainer.train()
    return batches


def logged(trainer, *names):
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


def test_reverse_kl_on_generated_completions_equals_that_of_trl(make, monkeypatch):
    """With TRL's random draws: the same completions, losses and gradients, though micro-batches have other rows."""
    monkeypatch.setattr("hf_distill.trainer.trainer.TRAIN_STATISTICS_EVERY", 1)  # the entropy of all tokens, as in TRL
    monkeypatch.setattr(row_dropping, "sample", lambda scores: torch.multinomial(scores.softmax(-1), 1)[:, 0])
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3)
    theirs = make(cls=DistillationTrainer, config=DistillationConfig, temperature=1.0, **options)
    theirs.train()
    ours = make(**options)  # built last, for the random numbers of the generation
    ours.train()
    names = ("loss", "grad_norm", "entropy", "completions/mean_length", "num_tokens")
    for results, expected in zip(logged(ours, *names), logged(theirs, *names), strict=True):
        assert results == pytest.approx(expected, rel=1e-5)


def test_rows_of_similar_length_are_in_one_micro_batch(make):
    rows = [{"prompt": "word " * (1 + 7 * i % 12)} for i in range(12)]
    trainer = make(rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    batches = batches_of(trainer)
    for step in (batches[:4], batches[4:]):
        lengths = [batch["attention_mask"].sum(1).tolist() for batch in step]
        flat = [length for of_batch in lengths for length in of_batch]
        assert flat == sorted(flat, reverse=True)
        assert [batch["input_ids"].shape[1] for batch in step] == [max(of_batch) for of_batch in lengths]
        assert len({*flat}) > 4


@pytest.mark.parametrize("bf16", [False, True])
def test_the_student_generates_without_dropout_in_the_precision_of_training(make, smollm2_tokenizer, bf16):
    """One autocast region around all steps casts a weight once; the completions are those of one region per step."""
    student = build("llama", 0, vocab=len(smollm2_tokenizer), width=16, dropout=0.5)
    seen, generated = [], []

    def record(_module, _inputs, kwargs):
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
            seen.append((student.training, torch.is_autocast_enabled("cpu")))

    for is_nested in (True, False):
        trainer = make(model=student, bf16=bf16, use_cpu=True, max_steps=1, learning_rate=0.0)
        if not is_nested:
            trainer.accelerator.autocast = nullcontext
        student.register_forward_pre_hook(record, with_kwargs=True)
        generated.append([batch["input_ids"].tolist() for batch in batches_of(trainer)])
        assert student.training
    assert seen
    assert {training for training, _ in seen} == {False}
    assert seen[0][1] == bf16
    assert generated[0] == generated[1]


def test_the_seconds_of_generation_are_logged(make):
    trainer = make(gradient_accumulation_steps=2, per_device_train_batch_size=2, on_policy_fraction=0.5)
    trainer.train()
    for seconds, of_step in logged(trainer, "generation_seconds", "step_time"):
        assert 0 < seconds < of_step
    assert trainer.evaluate()["eval_loss"] > 0
    assert "eval_generation_seconds" in trainer.state.log_history[-1]


def naive(trainer, batch, alpha, temperature):
    """The objective of a batch and the norm of its gradient, from materialized logits."""
    student, teacher = trainer.model, trainer.teacher.model
    student.zero_grad()
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:]
    s, t = (
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double()
        for model in (student, teacher)
    )
    log_s, log_t = (torch.log_softmax(logits / temperature, -1) for logits in (s, t))
    soft = temperature**2 * (log_s.exp() * (log_s - log_t)).sum(-1)
    hard = -torch.log_softmax(s, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    hard = hard * batch["has_labels"][:, None]
    loss = ((alpha * soft + (1 - alpha) * hard) * (labels != -100)).sum() / batch["items"]
    loss.backward()
    return loss.item(), float(torch.stack([p.grad.norm() for p in student.parameters()]).norm())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_teacher_on_a_server_scores_the_completions_of_the_student(make, smollm2_tokenizer, fraction):
    teacher = build("llama", 1, layers=3, width=24, vocab=len(smollm2_tokenizer))
    with VLLMServer(teacher, tokenizer=smollm2_tokenizer, context=512) as server:
        losses = {}
        for name, one in {"served": RemoteTeacher(server.url, top_k=TOP_K), "local": LocalTopK(teacher)}.items():
            options = {"on_policy_fraction": fraction, "gradient_accumulation_steps": 2}
            trainer = make(teacher=one, folder=name, **options)
            trainer.train()
            losses[name] = [log["soft_loss"] for log in trainer.state.log_history if "soft_loss" in log]
    assert len(losses["served"]) == 2
    assert losses["served"] == pytest.approx(losses["local"], rel=1e-5)


@pytest.mark.parametrize("rows", [ROWS, TEXT], ids=["messages", "text"])
def test_rows_that_may_outgrow_the_context_of_the_server_are_refused_before_the_first_step(
    make, smollm2_tokenizer, rows
):
    teacher = build("llama", 1, layers=3, width=24, vocab=len(smollm2_tokenizer))
    ids = [
        smollm2_tokenizer(row["prompt"])["input_ids"]
        if isinstance(row["prompt"], str)
        else smollm2_tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]
    with VLLMServer(teacher, context=512) as server:
        server.context = max(map(len, ids)) + 6 + 1  # the longest completion, and the token that vLLM generates
        assert make(rows, teacher=RemoteTeacher(server.url, top_k=TOP_K)).train().global_step == 2
        server.context -= 1
        with pytest.raises(DistillError, match=f"a prompt of {max(map(len, ids))} tokens.*--max-model-len"):
            make(rows, teacher=RemoteTeacher(server.url, top_k=TOP_K))
        long_prompts = [row | {"teacher_prompt": "word " * 600} for row in TEXT]
        server.context = 512
        with pytest.raises(DistillError, match="train_dataset has a prompt of 6"):
            make(long_prompts, teacher=RemoteTeacher(server.url, top_k=TOP_K))


def test_only_rows_of_the_data_set_have_hard_labels(make):
    trainer = make(on_policy_fraction=0.5, alpha=0.4, temperature=2.0, max_steps=1, learning_rate=0.0)
    (batch,) = batches_of(trainer)
    assert batch["has_labels"].sum() == 2
    assert int(batch["items"]) == int((batch["labels"] != -100).sum())
    (results,) = logged(trainer, "loss", "grad_norm")
    assert results == pytest.approx(naive(trainer, batch, 0.4, 2.0), rel=1e-5)


def test_the_author_of_a_generated_completion_is_the_student_and_rows_keep_their_weights(make):
    """The losses of each author and the weights against a naive reference."""
    by_origin = {"student": {"divergence": "reverse_kl", "alpha": 1.0}, "teacher": {"alpha": 0.7}}
    rows = [row | {"weight": i / 4, "origin": ("teacher", "data")[i % 2]} for i, row in enumerate(ROWS)]
    trainer = make(
        rows, on_policy_fraction=0.5, alpha=0.4, temperature=2.0, max_steps=1, learning_rate=0.0,
        divergence="forward_kl", by_origin=by_origin, per_device_train_batch_size=8,
    )  # fmt: skip
    (batch,) = batches_of(trainer)
    origin, weight = batch["origin"], batch["weight"][:, None]
    assert torch.equal(origin == 1, ~batch["has_labels"])
    assert {*origin.tolist()} == {0, 1, 2}
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:]
    s, t = (
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double()
        for model in (trainer.model, trainer.teacher.model)
    )
    log_s, log_t = (torch.log_softmax(logits / 2.0, -1) for logits in (s, t))
    reverse, forward = (log_s.exp() * (log_s - log_t)).sum(-1), (log_t.exp() * (log_t - log_s)).sum(-1)
    hard = -torch.log_softmax(s, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    hard = hard * batch["has_labels"][:, None]
    alpha = torch.tensor([0.7, 1.0, 0.4])[origin][:, None]
    soft = 4 * torch.where((origin == 1)[:, None], reverse, forward)
    loss = (weight * (alpha * soft + (1 - alpha) * hard) * (labels != -100)).sum() / batch["items"]
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["hard_loss_origin_student"] == 0
    assert log["soft_loss_origin_student"] > 0


@pytest.mark.parametrize("rows", [ROWS, TEXT], ids=["messages", "text"])
def test_without_generation_the_loss_equals_that_of_sft(make, rows):
    options = dict(max_steps=1, per_device_train_batch_size=12, alpha=0.5, temperature=2.0, divergence="js")
    options["learning_rate"] = 0.0
    ours = make(rows, on_policy_fraction=0.0, max_completion_length=64, **options)
    supervised = make(rows, cls=DistillSFTTrainer, config=DistillSFTConfig, folder="sft", **options)
    ours.train()
    supervised.train()
    names = ("loss", "soft_loss", "hard_loss", "grad_norm")
    assert logged(ours, *names)[0] == pytest.approx(logged(supervised, *names)[0], rel=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(supervised.evaluate()["eval_loss"], rel=1e-4)


def test_gradient_accumulation_does_not_change_the_loss(make):
    results = []
    for micro, pieces in ((4, 1), (2, 2), (1, 4)):
        options = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=pieces, max_steps=1)
        trainer = make(on_policy_fraction=0.5, alpha=0.5, folder=f"{micro}", **options)
        trainer.train()
        results += logged(trainer, "loss", "soft_loss", "hard_loss", "grad_norm")
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


class FailingCallback(TrainerCallback):
    """Raises an error between the micro-batches of the first step."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise RuntimeError("between two micro-batches")


def test_a_training_after_one_that_an_error_ended_within_a_step_generates_for_each_step(make):
    trainer, events = make(per_device_train_batch_size=2, gradient_accumulation_steps=2), []

    def record(name):
        method = getattr(trainer, name)

        def recorded(*args, **kwargs):
            events.append(name)
            return method(*args, **kwargs)

        setattr(trainer, name, recorded)

    record("_generate_and_score_completions")
    record("compute_loss")
    trainer.add_callback(FailingCallback)
    with pytest.raises(RuntimeError, match="between two micro-batches"):
        trainer.train()
    trainer.remove_callback(FailingCallback)
    events.clear()
    trainer.train()
    assert events == ["_generate_and_score_completions", "compute_loss", "compute_loss"] * 2


def test_the_share_of_generated_rows_is_exact_and_depends_on_the_seed(make):
    trainer, other_seed_trainer = (make(on_policy_fraction=0.3, seed=seed, folder=str(seed)) for seed in (1, 2))
    chosen = {}
    for name, one in (("first", trainer), ("again", trainer), ("other", other_seed_trainer)):
        chosen[name] = []
        for step in range(10):
            one.state.global_step = step
            chosen[name].append(one._rows_to_generate(ROWS[:4]))
    assert sum(map(sum, chosen["first"])) == 12
    assert {sum(rows) for rows in chosen["first"]} == {1, 2}
    assert chosen["first"] == chosen["again"] != chosen["other"]


def test_a_schedule_of_the_share_is_followed(make):
    trainer = make(on_policy_fraction=[[0.0, 0.0], [0.5, 1.0]], max_steps=20)
    trainer.state.max_steps = 20
    num_generated = []
    for step in range(20):
        trainer.state.global_step = step
        num_generated.append(sum(trainer._rows_to_generate(ROWS[:4])))
    assert num_generated[0] == 0
    assert num_generated[10:] == [4] * 10
    assert sum(num_generated[:10]) == 20
    assert num_generated[:10] == sorted(num_generated[:10])


def test_a_conversation_is_split_into_prompt_and_last_turn(make):
    talks = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
    options = dict(on_policy_fraction=0.5, alpha=0.5, max_steps=2)
    results = []
    for rows in (talks, ROWS):
        trainer = make(rows, folder=f"{len(results)}", **options)
        trainer.train()
        results.append(logged(trainer, "loss", "grad_norm"))
    assert results[0] == results[1]


def test_evaluation_uses_the_completions_of_the_data_set_if_there_are_any(make, smollm2_tokenizer):
    """Equal to DistillTrainer on the same answers as rows of tokens, and to those rows given as they are."""
    rows = tokenize_examples(Dataset.from_list(ROWS[:4]), smollm2_tokenizer, 64, assistant_only=False)
    trainer = make(on_policy_fraction=1.0, max_completion_length=64, per_device_eval_batch_size=4)
    options = dict(alpha=1.0, divergence="reverse_kl", temperature=1.0, per_device_eval_batch_size=4)
    options |= dict(eval_dataset=rows, data_collator=Collator(0))
    plain = make(cls=DistillTrainer, config=DistillConfig, folder="plain", **options)
    names = ("eval_loss", "eval_perplexity", "eval_kl", "eval_agreement", "eval_hard_loss")
    results, expected = trainer.evaluate(), plain.evaluate()
    assert [results[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)
    trainer.args.remove_unused_columns = False
    results = trainer.evaluate(rows)
    assert [results[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS[:4]])
    assert trainer.evaluate(prompts)["eval_loss"] != pytest.approx(expected["eval_loss"], rel=1e-5)


def test_sampling_and_loss_have_separate_temperatures(make):
    trainer = make(sampling_temperature=0.7, temperature=2.0)
    assert trainer.generation_config.temperature == 0.7
    assert trainer.args.temperature == trainer.distiller.terms[0].options["temperature"] == 2.0


def test_features_padded_vocabularies_and_adapters_on_the_head_work(make, smollm2_tokenizer):
    trainer = make(
        losses=[{"name": "hidden_mse", "weight": 0.1}, {"name": "value_relation", "weight": 0.1}],
        divergence={"name": "skew_kl", "lam": 0.2},
        teacher=build("llama", 1, layers=3, width=24, vocab=len(smollm2_tokenizer) + 64),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        on_policy_fraction=0.5,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lm_head" in name for name in moved)
    assert any("sidecar" in name for name in moved)
    assert all(loss > 0 for losses in logged(trainer, "hidden_mse_loss", "value_relation_loss") for loss in losses)
    assert trainer.evaluate()["eval_kl"] > 0


def test_a_resumed_run_equals_an_uninterrupted_run(make, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, on_policy_fraction=0.5, alpha=0.5)
    options |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    straight, resumed = make(**options), make(**options)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5}, "only the data set's completions have hard labels"),
        ({"beta": 0.5, "on_policy_fraction": 2.0}, r"on_policy_fraction is 2.0.*; beta=0.5 is TRL's option"),
        ({"sampling_temperature": 0.0, "divergence": "kll"}, "Unknown loss 'kll'.*; sampling_temperature is 0.0"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "say how to load a teacher"),
        ({"teacher_model": "x"}, "teacher_model is TRL's argument"),
        ({"teacher": None}, "needs a teacher"),
        ({"alpha": 0.0, "on_policy_fraction": 0.5}, "learns nothing from the teacher"),
        ({"config": DistillationConfig}, "args is a DistillationConfig: use OnPolicyDistillConfig"),
        ({"rows": [{"prompt": "x"}] * 8, "on_policy_fraction": 0.5}, "train_dataset has no column `completion`"),
        (
            {"torch_compile_backend": "eager", "losses": [{"name": "hidden_mse"}]},
            "torch_compile does not work with hidden_mse",
        ),
    ],
)
def test_unsupported_arguments_are_refused_with_the_reason(make, options, message):
    with pytest.raises(DistillError, match=message):
        make(**options)


def test_compiled_blocks_train_as_uncompiled_ones_do_and_generation_is_not_compiled(make):
    """With a cache, each block and length of a completion would need a graph."""
    plain = make()
    plain.train()
    compiled = make(torch_compile_backend="eager", compile_teacher=True)
    torch._dynamo.reset()
    counters.clear()
    compiled.train()
    assert logged(compiled, "loss", "grad_norm") == logged(plain, "loss", "grad_norm")
    assert 0 < counters["frames"]["ok"] <= 6
    torch._dynamo.reset()


def test_a_completion_that_does_not_continue_its_prompt_is_refused(make, smollm2_tokenizer, monkeypatch):
    template = "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", template)
    with pytest.raises(DistillError, match="does not continue the prompt by the completion"):
        make(on_policy_fraction=0.0).train()


def test_every_field_can_be_set_from_the_command_line(tmp_path):
    words = [
        "--output_dir",
        str(tmp_path),
        "--on_policy_fraction",
        "[[0, 0.25]]",
        "--bf16",
        "false",
        "--divergence",
        "js",
    ]
    (config,) = HfArgumentParser(OnPolicyDistillConfig).parse_args_into_dataclasses(words)
    assert (config.on_policy_fraction, config.alpha, config.temperature, config.divergence) == (0.25, 1.0, 1.0, "js")
    assert config.learning_rate == 1e-6
