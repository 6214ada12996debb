"""A checkpoint is written whole, or taken away again."""

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_Base: Any = Trainer if TYPE_CHECKING else object


class SavingMixin(_Base):
    """For any Trainer."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's; one that cannot be written is removed, and the error says what there still is.

        Raises:
            OSError: ENOSPC, with a message for whoever runs this.
        """
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(self._get_output_dir(trial=trial))
            half = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            free = shutil.disk_usage(folder).free
            written = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
            if not _for_want_of_room(error, free, written):
                raise
            if self.args.should_save:
                shutil.rmtree(half, ignore_errors=True)
            steps = [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
            last = f"resume from {PREFIX_CHECKPOINT_DIR}-{max(steps)}, which is whole" if steps else "start again"
            told = f"{free / 1e6:,.1f} MB are free there, and {written / 1e6:,.1f} MB of it had been written"
            raise OSError(errno.ENOSPC, f"{half} could not be written: {told}. Make room, and {last}.") from error


def _for_want_of_room(error: BaseException, free: int, written: int) -> bool:
    """Whether a disk was full: writers do not agree on how to say so."""
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return told or "os error 28" in str(error) or free < max(written, 1 << 20)
