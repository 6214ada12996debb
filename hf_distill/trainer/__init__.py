"""`DistillTrainer`: a transformers `Trainer` with a teacher.

Names are imported when they are first used, so that the package can be imported without torch.
"""

from importlib import import_module

_HOME = {
    "DistillArguments": "config",
    "DistillConfig": "config",
    "DistillMixin": "trainer",
    "DistillTrainer": "trainer",
    "DistillSeq2SeqConfig": "seq2seq",
    "DistillSeq2SeqTrainer": "seq2seq",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
