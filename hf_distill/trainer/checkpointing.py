"""`Checkpointer`: marks and rotates checkpoints, and verifies a checkpoint before training resumes from it."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import DistillError, RunError
from .checkpoints import (
    CheckpointDefect,
    checkpoint_defect,
    checkpoints_of,
    hint,
    latest_complete,
    list_defects,
    mark_complete,
    mark_incomplete,
    remove,
    restore,
    rotate,
)

logger = logging.get_logger(__name__)


class Checkpointer:
    """Marks, verifies and rotates the checkpoints of a training, and removes those that do not fit on the disk.

    Every method is called on all ranks. `args` are the training arguments, and `accelerator` is that of the training.
    """

    def __init__(self) -> None:
        self._verified: Path | None = None  # the checkpoint that was verified last
        self._save_total_limit: int | None = None  # the user's save_total_limit, while a checkpoint is written

    def resolve(
        self, checkpoint: str | Path | bool | None, args: TrainingArguments, accelerator: Accelerator
    ) -> str | bool | None:
        """Return the checkpoint to resume from, after it was verified; call it before a training.

        Args:
            checkpoint: `resume_from_checkpoint` of `Trainer.train`: a path, or True for the newest complete one.
            args: see the class.
            accelerator: see the class.

        Raises:
            DistillError: the checkpoint is incomplete, or differs from what was written.
        """
        folder = Path(str(args.output_dir))
        self._restore(folder, args, accelerator)
        if checkpoint is True:
            checkpoints = _checkpoints(folder, accelerator)
            newest = self.newest(args, accelerator)
            if newest is None and checkpoints:
                raise DistillError(
                    f"Training cannot be resumed from {checkpoints[0]}: writing it was interrupted, and no other "
                    "checkpoint is complete. Start again without resuming."
                )
            return True if newest is None else str(newest)  # the Trainer reports an empty folder
        if checkpoint:
            self.verify(Path(checkpoint), args, accelerator)
        return str(checkpoint) if isinstance(checkpoint, Path) else checkpoint

    def newest(self, args: TrainingArguments, accelerator: Accelerator) -> Path | None:
        """Return the newest complete checkpoint of the output folder, with all files verified.

        It skips incomplete checkpoints with a warning.

        Returns:
            the checkpoint; None if there is none, or if writing was interrupted for all of them.

        Raises:
            DistillError: a checkpoint was changed after it was written, or one is damaged and none is complete.
        """
        folder = Path(str(args.output_dir))
        self._restore(folder, args, accelerator)
        defects: dict[Path, CheckpointDefect] = {}
        for path in _checkpoints(folder, accelerator):
            defect = self._defect(path, args, accelerator)
            if defect is None:
                _warn_of_skipped(defects, args)
                return path
            if defect.state == "changed":
                _warn_of_skipped(defects, args)
                raise DistillError(f"Training cannot be resumed from {path}: {defect}.{hint(path, defect)}")
            defects[path] = defect
        damaged = {path: defect for path, defect in defects.items() if defect.state == "damaged"}
        if damaged:
            path, defect = next(iter(damaged.items()))
            raise DistillError(
                f"Training cannot be resumed from {folder}: no checkpoint is complete "
                f"({list_defects(defects.items())}). To start again, remove the checkpoints or choose another folder."
                f"{hint(path, defect)}"
            )
        _warn_of_skipped(defects, args)
        return None

    def verify(self, path: Path, args: TrainingArguments, accelerator: Accelerator, is_best: bool = False) -> None:
        """Check a checkpoint before it is read; the Trainer reports a folder that does not exist.

        Args:
            path: the checkpoint.
            args: of the Trainer.
            accelerator: of the Trainer.
            is_best: whether it is the best checkpoint, which is loaded after the last step; otherwise training
                resumes from it.

        Raises:
            DistillError: it is incomplete, or differs from what was written.
        """
        if path == self._verified or (defect := self._defect(path, args, accelerator)) is None:
            return
        others = [other for other in _checkpoints(path.parent, accelerator) if other != path]
        complete = next((other for other in others if self._defect(other, args, accelerator) is None), None)
        if is_best:
            others_text = f"{complete} is complete" if complete else "No other checkpoint is complete"
            raise DistillError(
                f"The last step is done, but the best checkpoint {path} cannot be loaded: {defect}. {others_text}. "
                "Load the model from a complete checkpoint, or train without load_best_model_at_end."
            )
        action = (
            f"{complete} is complete. Resume from it" if complete else "No other checkpoint is complete. Start again"
        )
        raise DistillError(f"Training cannot be resumed from {path}: {defect}. {action}.{hint(path, defect)}")

    def _defect(self, path: Path, args: TrainingArguments, accelerator: Accelerator) -> CheckpointDefect | None:
        """Return the defect of a checkpoint; the ranks that save read it, and all ranks return the same result."""
        defects = [checkpoint_defect(path) if args.should_save and path.is_dir() else None]
        if accelerator.num_processes > 1:
            defects = gather_object(defects)
        defect = next((each for each in defects if each is not None), None)
        self._verified = path if defect is None else None
        return defect

    def _restore(self, folder: Path, args: TrainingArguments, accelerator: Accelerator) -> None:
        """Finish interrupted removals and replacements before any rank reads the folder."""
        if args.should_save:
            restore(folder)
        accelerator.wait_for_everyone()

    @contextmanager
    def writing(
        self, folder: Path, args: TrainingArguments, accelerator: Accelerator, state: TrainerState
    ) -> Iterator[None]:
        """Write a checkpoint in this context: mark it as complete at the end, and only then remove older ones.

        A checkpoint that cannot be written is removed. If checkpoints are pushed to the Hub, `mark_complete` has to be
        called in the context, before the push. `best_model_checkpoint` of the state is read after it was written.

        Raises:
            OSError: the disk is full (ENOSPC); the message says what to do.
        """
        self._verified = None
        try:
            if args.should_save:
                mark_incomplete(folder)
            accelerator.wait_for_everyone()
            with self.no_rotation(args):
                yield
            if not args.push_to_hub:
                self.mark_complete(folder, args, accelerator)
        except RunError:
            _discard(folder, args)
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            _report_full_disk(folder, args, error)
            raise
        if args.should_save:
            rotate(folder.parent, folder, args.save_total_limit, state.best_model_checkpoint)

    @contextmanager
    def finishing(self, output_dir: Path, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
        """End a training in this context; with a limit of 1, remove every checkpoint but the best one at the end.

        `rotate` removes them, and not the Trainer, so that a kill cannot leave a part of one.
        """
        with self.no_rotation(args):
            yield
        best = state.best_model_checkpoint
        if args.should_save and best is not None and args.save_total_limit == 1 and Path(best).is_dir():
            rotate(output_dir, Path(best), 1, best)

    @contextmanager
    def no_rotation(self, args: TrainingArguments) -> Iterator[None]:
        """Keep the Trainer from removing checkpoints in this context."""
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None
        try:
            yield
        finally:
            args.save_total_limit = self._save_total_limit

    @contextmanager
    def users_limit(self, args: TrainingArguments) -> Iterator[None]:
        """Set the user's `save_total_limit` in this context, in which the training arguments are saved."""
        during_save = args.save_total_limit
        args.save_total_limit = self._save_total_limit or during_save
        try:
            yield
        finally:
            args.save_total_limit = during_save

    def mark_complete(self, folder: Path, args: TrainingArguments, accelerator: Accelerator) -> None:
        """Flush the files of a checkpoint, and mark it as complete, when all ranks have written theirs."""
        accelerator.wait_for_everyone()
        if args.should_save:
            mark_complete(folder)
        accelerator.wait_for_everyone()


def _checkpoints(folder: Path, accelerator: Accelerator) -> list[Path]:
    """Return the checkpoints of a folder on rank 0, newest first."""
    paths = [checkpoints_of(folder)]
    if accelerator.num_processes > 1:
        broadcast_object_list(paths)
    return paths[0]


def _warn_of_skipped(defects: Mapping[Path, CheckpointDefect], args: TrainingArguments) -> None:
    """Log which checkpoints are skipped; if training does not start, only the error names them."""
    if args.should_save:
        for path, defect in defects.items():
            logger.warning(f"{path} is skipped: {defect}.")


def _discard(folder: Path, args: TrainingArguments) -> None:
    """Remove an incomplete checkpoint, and restore the one of the same step that it was to replace."""
    if args.should_save:
        remove(folder)
        restore(folder.parent)


def _report_full_disk(folder: Path, args: TrainingArguments, error: BaseException) -> None:
    """Remove a checkpoint that did not fit on the disk, and say so; return if the error has another cause.

    Raises:
        OSError: the disk is full (ENOSPC).
    """
    free_bytes = shutil.disk_usage(folder.parent).free
    written_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not _is_disk_full(error, free_bytes, written_bytes):
        return
    _discard(folder, args)
    complete = latest_complete(folder.parent)
    action = f"resume from {complete.name}, which is complete" if complete else "start again"
    size = (
        f"{free_bytes / 1e6:,.1f} MB are free on the disk, and {written_bytes / 1e6:,.1f} MB of the checkpoint had "
        "been written"
    )
    message = f"{folder} could not be written: {size}. Free some space on the disk, and {action}."
    raise OSError(errno.ENOSPC, message) from error


def _is_disk_full(error: BaseException, free_bytes: int, written_bytes: int) -> bool:
    """Return whether a write failed because the disk is full, which not every library reports as ENOSPC."""
    has_error_code = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return has_error_code or "os error 28" in str(error) or free_bytes < max(written_bytes, 1 << 20)
