"""A trace of some steps of a training, by torch's profiler."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from torch.profiler import profile, record_function

from mixar.log import log


class StepProfiler(AbstractContextManager):
    """Traces `steps` into `folder`/steps-FIRST-LAST.pt.trace.json.gz, for Perfetto and TensorBoard's plug-in.

    Steps that a resumed run has behind it are not traced; where the run ends earlier, the trace ends with it.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self._running: profile | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace a `with` block as step `step`, if it is one of them."""
        if step not in self.steps:
            yield
            return
        if step == self.steps.start:
            self._running = profile()  # of the CPU, and of a GPU
            self._running.start()
        with record_function(f"ProfilerStep#{step}"):  # the plug-in's name of a step
            yield
        if step == self.steps[-1]:
            self._finish()

    def _finish(self) -> None:
        """Write the trace, if one was begun."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        file = self.folder / f"steps-{self.steps[0]}-{self.steps[-1]}.pt.trace.json.gz"
        running.export_chrome_trace(str(file))
        log.info("the trace of steps %d to %d is %s", self.steps[0], self.steps[-1], file)
