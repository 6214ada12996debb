"""`full_determinism=True`: no operator runs that has no deterministic algorithm on CUDA and raises an error there."""

import pytest
import torch
from gpu_meter import Problem
from tiny import build, collate, rows
from torch.utils._python_dispatch import TorchDispatchMode
from trained_tokenizers import trained

from hf_distill.analysis.soft_labels import SoftLabels
from hf_distill.cache import write_cache
from hf_distill.losses.registry import LOSSES
from hf_distill.teachers import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    MTPTeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
)

PACKAGED = sorted(name for name, loss in LOSSES.items() if loss.function.__module__.startswith("hf_distill."))
OF_DISTRIBUTIONS = [name for name in PACKAGED if LOSSES[name].fits("distribution")]
OF_CHUNKS = [name for name in PACKAGED if LOSSES[name].compares_chunks]
# Operators of which `torch.use_deterministic_algorithms` says that they raise an error on CUDA.
RAISE = {
    *("put", "put_", "histc", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "index_reduce"),
    *("nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "_embedding_bag_dense_backward"),
    *("adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("avg_pool3d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d"),
    *("max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_trilinear3d_backward", "index_reduce_"),
}


class RaisesAsOnCuda(TorchDispatchMode):
    """Raises an error in operators without a deterministic algorithm on CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, result = func.overloadpacket.__name__, func(*args, **kwargs)
        raises = (
            name in RAISE
            or (name in ("cumsum", "cumsum_") and (result.is_floating_point() or result.is_complex()))
            or (name == "bincount" and (len(args) > 1 or kwargs.get("weights") is not None))
            or (name in ("median", "nanmedian") and func._overloadname == "dim")
            or (name in ("scatter_reduce", "scatter_reduce_") and "prod" in (*args, kwargs.get("reduce")))
        )
        if raises and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return result


@pytest.fixture
def as_on_cuda():
    """Raise the errors of CUDA if deterministic algorithms are enabled, and disable these at the end."""
    with RaisesAsOnCuda():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.rand(3).cumsum(0),
        lambda: torch.ones(3, dtype=torch.long).cumsum(0, dtype=torch.float64),
        lambda: torch.ones(3, dtype=torch.long).bincount(torch.rand(3)),
        lambda: torch.rand(3).median(0),
        lambda: torch.rand(3).kthvalue(2),
        lambda: torch.rand(3).histc(),
    ],
)
def test_the_errors_of_cuda_are_raised(as_on_cuda, call):
    call()
    torch.use_deterministic_algorithms(True)
    torch.arange(3).cumsum(0)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        call()


def train(make_trainer, kind="llama", **options):
    trainer = make_trainer(kind, full_determinism=True, max_steps=2, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    assert torch.are_deterministic_algorithms_enabled()
    trainer.evaluate()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("name", [name for name in OF_DISTRIBUTIONS if name not in OF_CHUNKS])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_loss_trains_and_evaluates(make_trainer, as_on_cuda, name, kind):
    compares = LOSSES[name].compares
    if "logits" in compares or not compares:
        train(make_trainer, kind, losses=[{"name": name, "weight": 0.5}])
        return
    stack = {"stack": "decoder"} if kind == "t5" and LOSSES[name].feature != "embedding" else {}
    models = [build(kind, 0), build(kind, 1, layers=3, width=48)]
    for model in models:
        model.set_attn_implementation("eager")
    losses = [{"name": name, "weight": 0.5, **stack}]
    train(make_trainer, kind, losses=losses, model=models[0], teacher=models[1])


@pytest.mark.parametrize("name", OF_CHUNKS)
def test_every_loss_on_chunks_trains_and_evaluates(make_trainer, as_on_cuda, name):
    tokenizers = trained("groups"), trained("digits")
    student, teacher = (build("llama", seed, vocab=len(each)) for seed, each in enumerate(tokenizers))
    ids = torch.tensor(tokenizers[0]("x = [1, 22, 333] # naïve")["input_ids"])
    data = [{"input_ids": ids, "labels": ids}] * 4
    frozen = FrozenTeacher(teacher, processing_class=tokenizers[1])
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizers[0]}
    train(make_trainer, cross_tokenizer=name, model=student, teacher=frozen, **options)


TEACHERS = {
    "ema": EMATeacher,
    "mtp": lambda: MTPTeacher(num_future_tokens=2),
    "multi": lambda: MultiTeacher({"one": build("llama", 1), "two": build("llama", 2)}),
    "multi_view": lambda: MultiViewTeacher({"span_deletion": 0.2, "prepend_context_tokens": 2}),
    "peer": lambda: PeerTeacher(build("llama", 1), mutual=True),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_every_kind_of_teacher_trains_and_evaluates(make_trainer, as_on_cuda, name):
    train(make_trainer, teacher=TEACHERS[name](), alpha=0.0 if name == "mtp" else 0.5, divergence="adaptive_kl")


@pytest.mark.parametrize("kind", ["hidden", "top_k", "sampled"])
def test_caches_are_written_and_read(make_trainer, as_on_cuda, tmp_path, kind):
    torch.use_deterministic_algorithms(True)
    data = (rows("llama", 32), rows("llama", 7, seed=5))
    write_cache(str(tmp_path / "cache"), build("llama", 1), *data, kind=kind, collator=collate, batch_size=4)
    train(make_trainer, teacher=CachedTeacher(str(tmp_path / "cache")))


def test_soft_labels_are_measured(as_on_cuda):
    torch.use_deterministic_algorithms(True)
    measures = SoftLabels((1.0, 2.0), (1.0, 2.0))
    measures.add(torch.randn(5, 300), torch.arange(5))
    assert measures["ids"].shape == (5,)


@pytest.mark.parametrize("divergence", [name for name in OF_DISTRIBUTIONS if "logits" in LOSSES[name].compares])
def test_the_losses_of_a_gpu_run_no_other_operators(as_on_cuda, divergence):
    torch.use_deterministic_algorithms(True)
    meter, _ = Problem(tokens=512, vocab=2048, hidden=64, teacher_hidden=64, divergence=divergence).measure()
    assert meter.launches
