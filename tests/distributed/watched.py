"""A recipe on two processes, of which one meets its fate in the third step: python watched.py FOLDER [FATE]."""

import os
import signal
import sys
import time

from transformers import TrainerCallback

from hf_distill.errors import RunError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner import run_dir as folder_of_run

folder, fate = sys.argv[1], sys.argv[2]
STEPS = 400 if fate == "term" else 4


class Fate(TrainerCallback):
    """What happens to rank 1."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            if fate == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fate == "hang":
                time.sleep(600)
        if args.process_index == 0 and state.global_step == 2 and fate == "fail":
            raise KeyError("a fault of rank 0")


def unwritable(*args):
    raise OSError(5, "an input/output error")


if fate == "unwritable":
    folder_of_run._write_recipe = unwritable

overrides = [
    *(f"train.output_dir={folder}", f"train.max_steps={STEPS}", "train.save_steps=1000", "train.logging_steps=1"),
    *("train.ddp_timeout=10", "control=null"),
]
try:
    run_recipe(load_recipe("quickstart", overrides, smoke=True), resume="resume" in sys.argv, callbacks=[Fate()])
except RunError as error:
    sys.stderr.write(f"Error: {error}\n")
    sys.exit(1)
