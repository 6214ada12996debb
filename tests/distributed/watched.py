"""A recipe on two processes, with a fault of one of them in the third step: python watched.py FOLDER [FAULT]."""

import os
import signal
import sys
import time

from transformers import TrainerCallback

from hf_distill.errors import RunError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner import run_dir
from hf_distill.trainer.nonfinite import NonFiniteGuard

folder, fault = sys.argv[1], sys.argv[2]
STEPS = 400 if fault == "term" else 4


class RankFault(TrainerCallback):
    """Raises, hangs, stops or kills a rank in the third step."""

    is_third_step = False

    def on_step_begin(self, args, state, control, **kwargs):
        RankFault.is_third_step = state.global_step == 2
        if args.process_index == 1 and state.global_step == 2:
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault in ("hang", "nccl"):
                time.sleep(600)
        if args.process_index == 0 and state.global_step == 2 and fault == "fail":
            raise KeyError("a fault of rank 0")


def read_a_number(*args):
    """Stands for `tolist()` of a CUDA tensor in the third step, where the host waits for NCCL."""
    if RankFault.is_third_step and int(os.environ["RANK"]) == 0:
        time.sleep(600)
    return start_micro_batch(*args)


start_micro_batch = NonFiniteGuard.start_micro_batch
if fault == "nccl":
    NonFiniteGuard.start_micro_batch = read_a_number


def unwritable(*args):
    raise OSError(5, "an input/output error")


if fault == "unwritable":
    run_dir._write_recipe = unwritable

overrides = [
    *(f"train.output_dir={folder}", f"train.max_steps={STEPS}", "train.save_steps=1000", "train.logging_steps=1"),
    *("train.ddp_timeout=10", "control=null"),
]
try:
    run_recipe(load_recipe("quickstart", overrides, smoke=True), resume="resume" in sys.argv, callbacks=[RankFault()])
except RunError as error:
    sys.stderr.write(f"Error: {error}\n")
    sys.exit(1)
