"""`CheckpointMixin`: a Trainer that marks complete checkpoints, and verifies a checkpoint before it resumes from it."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
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
_Base: Any = Trainer if TYPE_CHECKING else object


class CheckpointMixin(_Base):
    """Marks, verifies and rotates the checkpoints of a Trainer, and removes those that do not fit on the disk."""

    _verified: Path | None = None  # the checkpoint that was verified last
    _save_total_limit: int | None = None  # the user's save_total_limit, while a checkpoint is written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does.

        Args:
            resume_from_checkpoint: a checkpoint, which is verified; True for the newest complete one.
            args: further arguments of `Trainer.train`.
            kwargs: further arguments of `Trainer.train`.

        Raises:
            DistillError: the checkpoint is incomplete, or differs from what was written.
        """
        self._restore(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            checkpoints = self._checkpoints(Path(self.args.output_dir))
            newest = self.newest_checkpoint()
            if newest is None and checkpoints:
                raise DistillError(
                    f"Training cannot be resumed from {checkpoints[0]}: writing it was interrupted, and no other "
                    "checkpoint is complete. Start again without resuming."
                )
            resume_from_checkpoint = True if newest is None else str(newest)  # the Trainer reports an empty folder
        elif resume_from_checkpoint:
            self.verify(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint of the output folder, with all files verified; call it on every rank.

        It skips incomplete checkpoints with a warning.

        Returns:
            the checkpoint; None if there is none, or if writing was interrupted for all of them.

        Raises:
            DistillError: a checkpoint was changed after it was written, or one is damaged and none is complete.
        """
        folder = Path(self.args.output_dir)
        self._restore(folder)
        defects: dict[Path, CheckpointDefect] = {}
        for path in self._checkpoints(folder):
            defect = self._defect(path)
            if defect is None:
                self._warn_of_skipped(defects)
                return path
            if defect.state == "changed":
                self._warn_of_skipped(defects)
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
        self._warn_of_skipped(defects)
        return None

    def _warn_of_skipped(self, defects: Mapping[Path, CheckpointDefect]) -> None:
        """Log which checkpoints are skipped; if training does not start, only the error names them."""
        if self.args.should_save:
            for path, defect in defects.items():
                logger.warning(f"{path} is skipped: {defect}.")

    def verify(self, path: Path) -> None:
        """Check a checkpoint before it is read; the Trainer reports a folder that does not exist.

        Args:
            path: the checkpoint.

        Raises:
            DistillError: it is incomplete, or differs from what was written.
        """
        if path == self._verified or (defect := self._defect(path)) is None:
            return
        others = [other for other in self._checkpoints(path.parent) if other != path]
        complete = next((other for other in others if self._defect(other) is None), None)
        action = (
            f"{complete} is complete. Resume from it" if complete else "No other checkpoint is complete. Start again"
        )
        raise DistillError(f"Training cannot be resumed from {path}: {defect}. {action}.{hint(path, defect)}")

    def _defect(self, path: Path) -> CheckpointDefect | None:
        """Return the defect of a checkpoint; the ranks that save read it, and all ranks return the same result."""
        defects = [checkpoint_defect(path) if self.args.should_save and path.is_dir() else None]
        if self.accelerator.num_processes > 1:
            defects = gather_object(defects)
        defect = next((each for each in defects if each is not None), None)
        self._verified = path if defect is None else None
        return defect

    def _checkpoints(self, folder: Path) -> list[Path]:
        """Return the checkpoints of a folder on rank 0, newest first."""
        paths: list[Any] = [checkpoints_of(folder)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(paths)
        return paths[0]

    def _restore(self, folder: Path) -> None:
        """Finish interrupted removals and replacements before any rank reads the folder."""
        if self.args.should_save:
            restore(folder)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, but no step after the last one: the Trainer runs one if it resumes from a finished training."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
            return
        self.control.should_training_stop = True
        if kwargs["resume_from_checkpoint"] is not None:
            self._load_rng_state(kwargs["resume_from_checkpoint"])

    def _load_best_model(self) -> None:
        """Verify the best checkpoint, then load it."""
        self.verify(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, mark it as complete, and only then remove older ones.

        A checkpoint that cannot be written is removed.

        Raises:
            OSError: the disk is full (ENOSPC); the message says what to do.
            RunError: the weights are not finite.
        """
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._verified = None
        try:
            if self.args.should_save:
                mark_incomplete(folder)
            self.accelerator.wait_for_everyone()
            with self._no_rotation():
                super()._save_checkpoint(model, trial)
            if not self.args.push_to_hub:
                self._mark_complete(folder)
        except RunError:
            self._discard(folder)
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            self._report_full_disk(folder, error)
            raise
        if self.args.should_save:
            rotate(output_dir, folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Remove checkpoints with `rotate` when training ends, so that a kill cannot leave a part of one."""
        with self._no_rotation():
            output = super()._finalize_training(trial, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1 and Path(best).is_dir():
            rotate(Path(self._get_output_dir(trial)), Path(best), 1, best)
        return output

    @contextmanager
    def _no_rotation(self) -> Iterator[None]:
        """Keep the Trainer from removing checkpoints in this context."""
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = self._save_total_limit

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model; the training arguments that are saved with it get the user's `save_total_limit`."""
        during_save = self.args.save_total_limit
        self.args.save_total_limit = self._save_total_limit or during_save
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.save_total_limit = during_save

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Mark the checkpoint as complete, then push it."""
        self._mark_complete(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _mark_complete(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
        self.accelerator.wait_for_everyone()

    def _discard(self, folder: Path) -> None:
        """Remove an incomplete checkpoint, and restore the one of the same step that it was to replace."""
        if self.args.should_save:
            remove(folder)
            restore(folder.parent)

    def _report_full_disk(self, folder: Path, error: BaseException) -> None:
        """Remove a checkpoint that did not fit on the disk, and say so; return if the error has another cause.

        Raises:
            OSError: the disk is full (ENOSPC).
        """
        free_bytes = shutil.disk_usage(folder.parent).free
        written_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if not _is_disk_full(error, free_bytes, written_bytes):
            return
        self._discard(folder)
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
