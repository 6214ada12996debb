"""`hf-distill serve` in a thread of the tests, on a free port of this machine."""

import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import uvicorn

from hf_distill.serving.app import create_app
from hf_distill.serving.metrics import Metrics
from hf_distill.serving.server import bind, url_of
from hf_distill.serving.teacher import ServedTeacher


class HiddenServer(AbstractContextManager):
    """A server of a model.

    batches:          number of rows of each forward
    requested_layers: the layers of the rows of all forwards
    delay:            seconds that each forward takes in addition
    """

    def __init__(self, model, folder: Path, *, name="org/teacher", tokenizer=None, key=None, port=0, **options):
        options = {"max_batch_tokens": 256, "max_queued_tokens": 4096} | options
        queued = options.pop("max_queued_tokens")
        self.teacher = ServedTeacher(model.eval(), name, tokenizer=tokenizer, **options)
        self.delay, self.batches, self.metrics = 0.0, list[int](), Metrics()
        self.requested_layers = set[tuple[int, ...]]()
        compute = self.teacher.compute_rows

        def compute_rows(rows):
            self.batches.append(len(rows))
            self.requested_layers |= {row.layers for row in rows}
            time.sleep(self.delay)
            return compute(rows)

        self.teacher.compute_rows = compute_rows
        folder.mkdir(parents=True, exist_ok=True)
        self.app = create_app(
            self.teacher,
            head_file=folder / "head.safetensors",
            token=key,
            max_queued_tokens=queued,
            metrics=self.metrics,
        )
        self._socket = bind("127.0.0.1", port)
        self.url, self.port = url_of(self._socket), self._socket.getsockname()[1]
        config = uvicorn.Config(self.app, lifespan="on", ws="none", log_config=None, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()
