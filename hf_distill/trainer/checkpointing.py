"""A Trainer's checkpoints: sealed when they are complete, verified before training resumes from them, rotated last."""

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
    listed,
    mark_complete,
    mark_incomplete,
    remove,
    restore,
    rotate,
)

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object


class CheckpointMixin(_Base):
    """For any Trainer."""

    _verified: Path | None = None  # the checkpoint that was read last and is complete
    _limit: int | None = None  # save_total_limit while a checkpoint is written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; `True` is the newest checkpoint that is complete.

        Raises:
            DistillError: the checkpoint is not complete, or differs from what was written.
        """
        self._restore(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            there = self._checkpoints(Path(self.args.output_dir))
            newest = self.newest_checkpoint()
            if newest is None and there:
                raise DistillError(
                    f"Training cannot be resumed from {there[0]}: it was not written to its end, and no other "
                    "checkpoint is complete: start again without resuming."
                )
            resume_from_checkpoint = True if newest is None else str(newest)  # the Trainer reports an empty folder
        elif resume_from_checkpoint:
            self.verify(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of the output folder, every file verified; called on every rank.

        Those that are not complete are passed over with a warning. None: there is none, or the writing of all of them
        was interrupted.

        Raises:
            DistillError: a checkpoint was changed after it was written, or all of them are damaged.
        """
        folder = Path(self.args.output_dir)
        self._restore(folder)
        flaws: dict[Path, CheckpointDefect] = {}
        for path in self._checkpoints(folder):
            found = self._flaw(path)
            if found is None:
                self._warn_of(flaws)
                return path
            if found.state == "changed":
                self._warn_of(flaws)
                raise DistillError(f"Training cannot be resumed from {path}: {found}.{hint(path, found)}")
            flaws[path] = found
        damaged = {path: found for path, found in flaws.items() if found.state == "damaged"}
        if damaged:
            path, found = next(iter(damaged.items()))
            raise DistillError(
                f"Training cannot be resumed from {folder}: no checkpoint is complete ({listed(flaws.items())})."
                f" To start again, remove the checkpoints or choose another folder.{hint(path, found)}"
            )
        self._warn_of(flaws)
        return None

    def _warn_of(self, flaws: Mapping[Path, CheckpointDefect]) -> None:
        """Log which checkpoints are passed over; where training does not start, the error alone names them."""
        if self.args.should_save:
            for path, found in flaws.items():
                logger.warning(f"{path} is skipped: {found}.")

    def verify(self, path: Path) -> None:
        """Check a checkpoint before it is read; a folder that is missing is the Trainer's to report.

        Raises:
            DistillError: it is not complete, or differs from what was written.
        """
        if path == self._verified or (found := self._flaw(path)) is None:
            return
        others = [other for other in self._checkpoints(path.parent) if other != path]
        whole = next((other for other in others if self._flaw(other) is None), None)
        then = f"{whole} is complete: resume from that" if whole else "No other is complete: start again"
        raise DistillError(f"Training cannot be resumed from {path}: {found}. {then}.{hint(path, found)}")

    def _flaw(self, path: Path) -> CheckpointDefect | None:
        """What is wrong with a checkpoint; the ranks that save read it, and all ranks get the same answer."""
        flaws = [checkpoint_defect(path) if self.args.should_save and path.is_dir() else None]
        if self.accelerator.num_processes > 1:
            flaws = gather_object(flaws)
        found = next((each for each in flaws if each is not None), None)
        self._verified = path if found is None else None
        return found

    def _checkpoints(self, folder: Path) -> list[Path]:
        """The checkpoints of a folder, newest first, as rank 0 sees them."""
        paths: list[Any] = [checkpoints_of(folder)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(paths)
        return paths[0]

    def _restore(self, folder: Path) -> None:
        if self.args.should_save:
            restore(folder)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **kwargs: Any) -> None:
        """As the Trainer's, which takes one step too many where it resumes from the last one, or from an early stop."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)
            return
        self.control.should_training_stop = True
        if kwargs["resume_from_checkpoint"] is not None:
            self._load_rng_state(kwargs["resume_from_checkpoint"])

    def _load_best_model(self) -> None:
        """As the Trainer's, of a checkpoint that is verified."""
        self.verify(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's, but older checkpoints are removed after this one is sealed.

        One that cannot be written is removed again.

        Raises:
            OSError: ENOSPC, with a message for whoever runs this.
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
                self._seal(folder)
        except RunError:
            self._discard(folder)
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            self._report_full_disk(folder, error)
            raise
        if self.args.should_save:
            rotate(output_dir, folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; where it would keep the best checkpoint alone, a kill cannot leave half of another."""
        with self._no_rotation():
            output = super()._finalize_training(trial, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1 and Path(best).is_dir():
            rotate(Path(self._get_output_dir(trial)), Path(best), 1, best)
        return output

    @contextmanager
    def _no_rotation(self) -> Iterator[None]:
        """The Trainer removes no checkpoints in the block."""
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = self._limit

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the Trainer's, which saves its arguments too: those that the user gave."""
        current, self.args.save_total_limit = self.args.save_total_limit, self._limit or self.args.save_total_limit
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.save_total_limit = current

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, of a checkpoint that is sealed."""
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
        self.accelerator.wait_for_everyone()

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint that was begun; one of the same step that it was to replace returns."""
        if self.args.should_save:
            remove(folder)
            restore(folder.parent)

    def _report_full_disk(self, folder: Path, error: BaseException) -> None:
        """Remove what did not fit on a full disk, and raise a message; return where the error was another."""
        free = shutil.disk_usage(folder.parent).free
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if not _for_want_of_room(error, free, written):
            return
        self._discard(folder)
        whole = latest_complete(folder.parent)
        last = f"resume from {whole.name}, which is complete" if whole else "start again"
        size = f"{free / 1e6:,.1f} MB are free there, and {written / 1e6:,.1f} MB of it had been written"
        raise OSError(errno.ENOSPC, f"{folder} could not be written: {size}. Make room, and {last}.") from error


def _for_want_of_room(error: BaseException, free: int, written: int) -> bool:
    """Whether a disk was full: writers do not agree on how to say so."""
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return told or "os error 28" in str(error) or free < max(written, 1 << 20)
