"""Trackers such as TensorBoard get every value of the logs."""

import math


def test_tensorboard_gets_all_losses_and_statistics(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(
        report_to=["tensorboard"],
        eval_strategy="steps",
        eval_steps=2,
        losses=[{"name": "hidden_cosine", "weight": 0.1}],
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    logged = {}
    for log in trainer.state.log_history:
        for name, value in log.items():
            kind = "eval" if name.startswith("eval_") else "train"
            logged[f"{kind}/{name.removeprefix('eval_')}", log["step"]] = value
    tracked = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    for name in (
        "soft_loss",
        "hard_loss",
        "hidden_cosine_loss",
        "kl",
        "agreement",
        "teacher_entropy",
        "student_entropy",
    ):
        for kind, steps in (("train", (1, 2, 3, 4)), ("eval", (2, 4))):
            for step in steps:
                key = f"{kind}/{name}", step
                assert math.isclose(tracked[key], logged[key], rel_tol=1e-6), key
