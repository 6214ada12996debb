"""`DistillTrainer`: a transformers `Trainer` with a teacher.

Names are imported when they are first used, so that the package can be imported without torch.
"""

from typing import TYPE_CHECKING

from ..lazy_imports import import_on_first_use

_HOME = {
    "DistillArguments": ".config",
    "DistillConfig": ".config",
    "DistillMixin": ".trainer",
    "DistillTrainer": ".trainer",
    "DistillSeq2SeqConfig": ".seq2seq",
    "DistillSeq2SeqTrainer": ".seq2seq",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from .config import DistillArguments as DistillArguments
    from .config import DistillConfig as DistillConfig
    from .seq2seq import DistillSeq2SeqConfig as DistillSeq2SeqConfig
    from .seq2seq import DistillSeq2SeqTrainer as DistillSeq2SeqTrainer
    from .trainer import DistillMixin as DistillMixin
    from .trainer import DistillTrainer as DistillTrainer
else:
    __getattr__ = import_on_first_use(__name__, _HOME)
