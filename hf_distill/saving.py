"""A checkpoint is written whole, or it is known for what it is; training goes on from whole ones alone."""

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .checkpoints import begin, checkpoints_of, flaw, newest_whole, seal
from .errors import DistillError

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object


class SavingMixin(_Base):
    """For any Trainer."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; `True` is the newest checkpoint that is whole.

        Raises:
            DistillError: a checkpoint that is not whole was asked for, or there is no other.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole(self, asked: str | bool) -> str | bool:
        given = isinstance(asked, str)
        there = [Path(str(asked))] if given else checkpoints_of(Path(self.args.output_dir))
        broken = {}
        for path in there:
            if not path.is_dir() or (why := flaw(path)) is None:  # what is not there is for the Trainer to say
                return str(path)
            broken[path] = why
            if not given:
                logger.warning(f"{path} is skipped: {why}.")
        if not broken:
            return asked
        path, why = next(iter(broken.items()))
        whole = newest_whole(path.parent)
        then = f"{whole} is whole: resume from that" if whole else "No other is whole: start again without resuming"
        raise DistillError(f"Training cannot be resumed from {path}: {why}. {then}.")

    def _run_epoch(self, **kwargs: Any) -> None:
        """As the Trainer's, which takes one step too many where it resumes from the last one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
            return
        self.control.should_training_stop = True
        if kwargs["resume_from_checkpoint"] is not None:
            self._load_rng_state(kwargs["resume_from_checkpoint"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's; sealed when all ranks have written. One that cannot be written is removed again.

        Raises:
            OSError: ENOSPC, with a message for whoever runs this.
        """
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save:
                begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if not self.args.push_to_hub:
                self._seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            self._take_away(folder, error)
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, of a checkpoint that is sealed."""
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
        self.accelerator.wait_for_everyone()

    def _take_away(self, half: Path, error: BaseException) -> None:
        """Remove what did not fit on a full disk, and say so; other errors are left as they are."""
        free = shutil.disk_usage(half.parent).free
        written = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
        if not _for_want_of_room(error, free, written):
            return
        if self.args.should_save:
            shutil.rmtree(half, ignore_errors=True)
        whole = newest_whole(half.parent)
        last = f"resume from {whole.name}, which is whole" if whole else "start again"
        told = f"{free / 1e6:,.1f} MB are free there, and {written / 1e6:,.1f} MB of it had been written"
        raise OSError(errno.ENOSPC, f"{half} could not be written: {told}. Make room, and {last}.") from error


def _for_want_of_room(error: BaseException, free: int, written: int) -> bool:
    """Whether a disk was full: writers do not agree on how to say so."""
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return told or "os error 28" in str(error) or free < max(written, 1 << 20)
