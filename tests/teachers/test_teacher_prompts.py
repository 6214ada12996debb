"""Teachers with another prompt than the student: they read it before the same completion, token by token."""

import json

import pytest
import torch
from datasets import Dataset
from gpu_sync import reads_of_steps
from servers.teacher_servers import TOP_K, LocalTopK, VLLMServer
from tiny import build, conversation

from hf_distill import DistillError
from hf_distill.cache import write_cache
from hf_distill.core.targets import Targets
from hf_distill.data import Collator, pack, tokenize_dataset, with_teacher_prompts
from hf_distill.data.formats import TEACHER_PROMPT
from hf_distill.recipe.schema import Recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.datasets import prepare_data
from hf_distill.teachers import (
    CachedTeacher,
    EMATeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
    RemoteTeacher,
    RoutedTeacher,
)
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer, OnPolicyDistillConfig, OnPolicyDistillTrainer

EXAMPLES = [
    {"prompt": f"{i}+{i}=", "answer": str(2 * i), "completion": f"{2 * i}, because {i} is{' really' * (i % 3)} {i}"}
    for i in range(1, 9)
]
DATA = Dataset.from_list(EXAMPLES)
TEMPLATE = "Answer: {answer}\n{prompt}"
OPTIONS = {"alpha": 0.6, "max_steps": 1, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8}


def tokenizer():
    return byte_tokenizer()


def model(seed=0, **options):
    return build("llama", seed, vocab=len(tokenizer()), **options)


def prompted_rows():
    documents = with_teacher_prompts(DATA, TEMPLATE)
    return tokenize_dataset(documents, tokenizer(), 64, second_prompt=TEACHER_PROMPT)


def trainer_of(make_trainer, **options):
    arguments = {
        "model": model(),
        "teacher": model(1),
        "train_dataset": prompted_rows(),
        "eval_dataset": prompted_rows(),
    }
    arguments |= {"data_collator": Collator(tokenizer().pad_token_id), "remove_unused_columns": False}
    return make_trainer(**OPTIONS | arguments | options)


def logits(row, one, prefix=""):
    inputs = {"labels": torch.tensor([row[f"{prefix}labels"]])}
    targets = Targets.from_batch(inputs, shift=True)
    output = one.eval()(input_ids=torch.tensor([row[f"{prefix}input_ids"]]), output_hidden_states=True)
    hidden = targets.gather(output.hidden_states[-2])
    return targets.gather_logits(output.logits), targets.labels, hidden


def reference(student, teacher, rows, temperature=2.0):
    soft, hard, hidden = [], [], []
    for row in rows:
        with torch.no_grad():
            teacher_logits, teacher_labels, teacher_hidden = logits(row, teacher, "teacher_")
        student_logits, labels, student_hidden = logits(row, student)
        assert torch.equal(labels, teacher_labels)
        p, q = (torch.log_softmax(x / temperature, -1) for x in (teacher_logits, student_logits))
        soft.append(temperature**2 * (p.exp() * (p - q)).sum(-1))
        hard.append(torch.nn.functional.cross_entropy(student_logits, labels, reduction="none"))
        hidden.append((student_hidden - teacher_hidden).square().mean(-1))
    return torch.cat(soft).mean(), torch.cat(hard).mean(), torch.cat(hidden).mean()


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("kind", ["frozen", "several", "routed", "self"])
def test_the_loss_compares_the_same_tokens_after_different_prompts(make_trainer, kind):
    rows, teacher = prompted_rows(), model(1)
    teachers = {
        "frozen": teacher,
        "several": MultiTeacher({"a": teacher, "b": teacher}),
        "routed": RoutedTeacher({"a": teacher, "b": model(1)}),
        "self": EMATeacher(0.5),
    }
    rows = rows.add_column("teacher", ["a", "b"] * 4) if kind == "routed" else rows
    trainer = trainer_of(make_trainer, teacher=teachers[kind], train_dataset=rows, eval_dataset=rows)
    soft, hard, _ = reference(model(), model() if kind == "self" else model(1), rows)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(0.6 * soft.item() + 0.4 * hard.item(), rel=1e-5)
    if kind == "self":
        assert soft > 0.01, "the student's own distribution is another one after the teacher's prompt"


def test_hidden_states_are_compared_token_by_token(make_trainer):
    trainer = trainer_of(make_trainer, losses=[{"name": "hidden_mse", "layers": [[0, 0]]}])
    _, _, hidden = reference(model(), model(1), prompted_rows())
    assert first_log(trainer)["hidden_mse_loss"] == pytest.approx(hidden.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_holds_the_signals_after_the_teachers_prompt(make_trainer, tmp_path, kind):
    options = {"dtype": "float32"} if kind == "hidden" else {"k": 16, "temperature": 1.0}
    collator = Collator(tokenizer().pad_token_id)
    write_cache(tmp_path / "cache", model(1), prompted_rows(), collator=collator, kind=kind, **options)
    log = first_log(trainer_of(make_trainer, teacher=CachedTeacher(str(tmp_path / "cache")), temperature=1.0))
    if kind == "hidden":
        live = first_log(trainer_of(make_trainer, temperature=1.0))
        assert log["loss"] == pytest.approx(live["loss"], rel=1e-5)
    plain = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prompted_rows()]
    with pytest.raises(DistillError, match="examples of a batch are not in"):
        trainer_of(
            make_trainer, teacher=CachedTeacher(str(tmp_path / "cache")), temperature=1.0, train_dataset=plain
        ).train()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_server_gets_the_teachers_prompt(make_trainer, prefetch):
    options = {"temperature": 1.0, "per_device_train_batch_size": 2, "max_steps": 3}
    local = trainer_of(make_trainer, teacher=LocalTopK(model(1)), folder="local", **options)
    local.train()
    with VLLMServer(model(1), max_top_k=TOP_K) as server:
        teacher = RemoteTeacher(server.url, top_k=TOP_K, prefetch=prefetch)
        remote = trainer_of(make_trainer, teacher=teacher, **options)
        remote.train()
        sent = [body["prompt"] for path, body, _ in server.requests if path == "/v1/completions"]
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (remote, local)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(row["teacher_input_ids"] in sent for row in prompted_rows().select(range(6)))


def test_a_step_still_reads_once_for_each_micro_batch(make_trainer):
    options = {"per_device_train_batch_size": 1, "max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 100}
    _, micro, _ = reads_of_steps(trainer_of(make_trainer, **options), 2)
    assert micro == {("tolist", "core/targets.py:_read"): 1}


def test_evaluation_and_the_self_check_read_the_teachers_prompt(make_trainer):
    trainer = trainer_of(make_trainer, alpha=1.0, temperature=1.0, self_check=True)
    soft, _, _ = reference(model(), model(1), prompted_rows(), temperature=1.0)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(soft.item(), rel=1e-4)
    trainer.train()


def test_other_target_tokens_for_the_teacher_are_refused(make_trainer):
    rows = [dict(row) for row in prompted_rows()]
    rows[2]["teacher_labels"] = [*rows[2]["teacher_labels"][:-1], 5]
    with pytest.raises(DistillError, match=r"Rows \[2\] of the batch have other target tokens for the teacher"):
        trainer_of(make_trainer, train_dataset=rows).train()


@pytest.mark.parametrize("teacher", [lambda: PeerTeacher(model(1)), lambda: MultiViewTeacher({"token_dropout": 0.1})])
def test_teachers_that_read_the_students_batch_are_refused_when_the_trainer_is_created(make_trainer, teacher):
    with pytest.raises(DistillError, match="reads the student's batch: remove these columns, or use a frozen"):
        trainer_of(make_trainer, teacher=teacher(), processing_class=tokenizer())


def test_sft_trainer_refuses_prompts_that_its_tokenization_leaves_out(tmp_path):
    data = with_teacher_prompts(DATA, TEMPLATE)
    args = DistillSFTConfig(str(tmp_path), bf16=False, report_to="none")
    with pytest.raises(DistillError, match="train_dataset has teacher_prompt, which SFTTrainer's tokenization"):
        DistillSFTTrainer(model(), args, teacher=model(1), train_dataset=data, processing_class=tokenizer())


def test_conversations_replace_the_content_of_the_last_message():
    rows = [{"prompt": conversation(i)[:1], "completion": conversation(i)[1:], "hint": f"hint {i}"} for i in range(3)]
    prompts = with_teacher_prompts(Dataset.from_list(rows), "{prompt} ({hint})")["teacher_prompt"]
    assert prompts[1] == [{"role": "user", "content": f"{conversation(1)[0]['content']} (hint 1)"}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: with_teacher_prompts(Dataset.from_list(EXAMPLES), "{anwser}"),
            "row 0 .* uses anwser, which this example",
        ),
        (
            lambda: with_teacher_prompts(Dataset.from_list(EXAMPLES), "{prompt"),
            "is no template: .*Write {{ for a brace",
        ),
        (lambda: with_teacher_prompts(Dataset.from_list(EXAMPLES), "{answer[0]}"), "must be the name of a column"),
        (lambda: with_teacher_prompts(Dataset.from_list([{"text": "x"}]), "{text}"), "needs the column `prompt`"),
        (
            lambda: tokenize_dataset(
                Dataset.from_list([EXAMPLES[0] | {"teacher_prompt": "a"}, EXAMPLES[1] | {"teacher_prompt": None}]),
                tokenizer(),
                64,
                second_prompt=TEACHER_PROMPT,
            ),
            "row 1 .*column teacher_prompt: it must have the type of the prompt",
        ),
        (
            lambda: tokenize_dataset(
                Dataset.from_list([EXAMPLES[0] | {"teacher_prompt": ""}]), tokenizer(), 64, second_prompt=TEACHER_PROMPT
            ),
            "row 0 .*column teacher_prompt: it is empty",
        ),
        (
            lambda: tokenize_dataset(DATA, tokenizer(), 64, second_prompt=TEACHER_PROMPT),
            "a teacher_prompt needs the columns completion, prompt, teacher_prompt",
        ),
        (lambda: pack(prompted_rows(), 64), "rows and their teacher_prompt have different lengths"),
    ],
)
def test_wrong_prompts_are_refused(make, message):
    with pytest.raises(DistillError, match=message):
        make()


def test_on_policy_the_teacher_reads_its_prompt_before_the_students_completion(tmp_path):
    byte, calls = tokenizer(), []
    rows = [{"prompt": f"{i}+{i}=", "teacher_prompt": f"It is {2 * i}. {i}+{i}="} for i in range(1, 9)]
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    fields |= {"bf16": False, "report_to": "none", "dataloader_pin_memory": False, "max_completion_length": 6}
    trainer = OnPolicyDistillTrainer(
        args=OnPolicyDistillConfig(str(tmp_path), **fields),
        model=model(),
        teacher=model(1),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte,
    )
    forward = trainer.teacher.forward

    def record(inputs, targets, requests):
        calls.append((inputs["input_ids"].clone(), inputs["attention_mask"].clone(), targets))
        return forward(inputs, targets, requests)

    trainer.teacher.forward = record
    compute_loss, batches = trainer.compute_loss, []

    def keep(one, inputs, *more, **kwargs):
        batches.append(inputs)
        return compute_loss(one, inputs, *more, **kwargs)

    trainer.compute_loss = keep
    trainer.train()
    by_prompt = {row["prompt"]: row["teacher_prompt"] for row in rows}
    assert len(calls) == len(batches) == 2
    for (ids, mask, targets), batch in zip(calls, batches, strict=True):
        completions = [c[m.bool()] for c, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        prompts = [byte.decode(p[m.bool()]) for p, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            expected = [*byte(by_prompt[prompt])["input_ids"], *completion.tolist()]
            assert ids[row][mask[row].bool()].tolist() == expected
        assert targets.labels.tolist() == torch.cat(completions).tolist()


@pytest.mark.parametrize("missing", [None, ""])
def test_on_policy_every_row_has_a_teacher_prompt_or_none_has(tmp_path, missing):
    rows = [{"prompt": f"{i}=", "teacher_prompt": f"{i}. {i}=" if i < 4 else missing} for i in range(8)]
    data, args = (
        Dataset.from_list(rows),
        OnPolicyDistillConfig(str(tmp_path), report_to="none", bf16=False, max_steps=2),
    )
    options = {"model": model(), "teacher": model(1), "processing_class": tokenizer()}
    with pytest.raises(DistillError, match="4 of 8 rows of train_dataset have no `teacher_prompt`, the first is row 4"):
        OnPolicyDistillTrainer(args=args, train_dataset=data, **options)
    args.shuffle_dataset, args.per_device_train_batch_size = False, 4
    stream = Dataset.from_list(rows[4:]).to_iterable_dataset()  # whole batches have none
    trainer = OnPolicyDistillTrainer(args=args, train_dataset=stream, **options)
    with pytest.raises(DistillError, match="Some rows of a batch have no `teacher_prompt`"):
        trainer.train()


def recipe_of(tmp_path, sources, **data):
    paths = {}
    for name, rows in sources.items():
        paths[name] = {"path": str(tmp_path / f"{name}.jsonl")}
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "student": {"model": "smoke:llama/student"},
        "teacher": {"model": "smoke:llama/teacher"},
        "data": paths | {"eval": {"holdout": 0.5}, "max_length": 64} | data,
        "train": {"output_dir": "runs/x", "max_steps": 1},
    }
    return Recipe.model_validate(values)


PROMPTED = [row | {"teacher_prompt": f"{row['answer']}. {row['prompt']}"} for row in EXAMPLES]


@pytest.mark.parametrize("lacks", ["source", "eval"])
def test_recipes_refuse_data_of_which_a_part_has_teacher_prompts(tmp_path, lacks):
    (tmp_path / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in EXAMPLES))
    if lacks == "source":
        recipe, name = recipe_of(tmp_path, {"task": PROMPTED, "other": EXAMPLES}), "data.other"
    else:
        evaluation = {"path": str(tmp_path / "eval.jsonl"), "split": "train"}
        recipe, name = recipe_of(tmp_path, {"task": PROMPTED}, eval=evaluation), "data.eval"
    with pytest.raises(DistillError, match=f"{name} has no column `teacher_prompt`, and data.task has"):
        prepare_data(recipe, tokenizer(), 0, 4)


def test_conversations_may_have_a_teacher_prompt(tmp_path):
    user = [{"role": "user", "content": "1+1="}]
    hinted = [{"role": "user", "content": "It is 2. 1+1="}]
    answer = [{"role": "assistant", "content": "2"}]
    conversations = [{"messages": user + answer, "teacher_prompt": hinted}] * 4
    pairs = [{"prompt": user, "completion": answer, "teacher_prompt": hinted}] * 4
    rows = [
        prepare_data(recipe_of(tmp_path, {"task": data}), tokenizer(), 0, 4).train for data in (conversations, pairs)
    ]
    assert rows[0].to_list() == rows[1].to_list()
    assert len(rows[0][0]["teacher_input_ids"]) > len(rows[0][0]["input_ids"])
