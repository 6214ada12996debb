"""Without a teacher, or with alpha = 0, it is `transformers.Trainer`, bit for bit."""

import pytest
import torch
from tiny import KINDS, build
from transformers import Trainer

from hf_distill import DistillTrainer

STEPS = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)


def trained(trainer):
    trainer.train()
    losses = [{k: log[k] for k in ("loss", "grad_norm") if k in log} for log in trainer.state.log_history]
    metrics = trainer.evaluate()
    timing = ("runtime", "per_second", "preparation_time")
    return losses, {k: v for k, v in metrics.items() if not k.endswith(timing)}, trainer.model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["no teacher", "alpha 0"])
def test_losses_weights_and_evaluation_are_bit_identical(make_trainer, kind, how):
    options = {"teacher": None} if how == "no teacher" else {"teacher": build(kind, 1), "alpha": 0.0}
    model = lambda: build(kind, 0, dropout=0.1)  # noqa: E731
    plain = trained(make_trainer(kind, cls=Trainer, model=model(), **STEPS))
    ours = trained(make_trainer(kind, cls=DistillTrainer, model=model(), **STEPS, **options))
    assert ours[0] == plain[0]
    assert ours[1] == plain[1]
    assert ours[2].keys() == plain[2].keys()
    assert all(torch.equal(ours[2][name], plain[2][name]) for name in plain[2])


def test_label_smoothing_without_a_teacher_is_the_trainers(make_trainer):
    plain = trained(make_trainer(cls=Trainer, label_smoothing_factor=0.1))
    ours = trained(make_trainer(teacher=None, label_smoothing_factor=0.1))
    assert ours[:2] == plain[:2]


def test_all_arguments_stand_where_the_trainer_has_them(tmp_path):
    from inspect import signature

    from tiny import collate, rows

    from hf_distill import DistillConfig

    data = rows("llama")
    trainer = DistillTrainer(build("llama"), DistillConfig(str(tmp_path)), collate, data, data[:4], None, teacher=None)
    assert (trainer.data_collator, trainer.train_dataset, trainer.eval_dataset) == (collate, data, data[:4])
    for name in list(signature(Trainer.__init__).parameters)[1:]:
        DistillTrainer(
            **{"model": build("llama"), "args": DistillConfig(str(tmp_path))}
            | ({name: None} if name not in ("model", "args", "optimizers") else {})
        )
    with pytest.raises(TypeError, match="train_datasets"):
        DistillTrainer(build("llama"), DistillConfig(str(tmp_path)), train_datasets=data)


def test_a_missing_teacher_is_told_once(make_trainer, caplog):
    from hf_distill.trainer import logger

    logger.warning_once.cache_clear()
    make_trainer(teacher=None)
    make_trainer(teacher=None)
    make_trainer(teacher=None, alpha=0.0)
    assert [r.message for r in caplog.records].count(
        "No teacher: this trains on the hard labels alone. Pass `teacher=` to distil."
    ) == 1
