"""The place of each worker: the GPUs that it sees, and as many threads that all workers together fill the cores."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from looptransfer.checks import check_count
from looptransfer.errors import InputError
from looptransfer.trials.run import Run, Trial

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Slot:
    """The place of one worker.

    Attributes:
        device: torch's name of it in the worker: "cpu", "cuda", "mps"…
        gpus: the GPUs that it sees, as CUDA_VISIBLE_DEVICES has them; None leaves what this process sees.
        threads: how many each of its processes may start; None leaves it to them.
    """

    device: str
    gpus: str | None = None
    threads: int | None = None

    def environment(self) -> dict[str, str]:
        """The variables by which a process keeps to its place; a number of threads that is set already stays."""
        names = [] if self.threads is None else [name for name in THREADS if name not in os.environ]
        return dict.fromkeys(names, str(self.threads)) | ({} if self.gpus is None else {VISIBLE: self.gpus})

    def trial(self, run: Run, directory: Path) -> Trial:
        """A run made here."""
        return Trial(**asdict(run), device=self.device, directory=directory, environment=self.environment())


def slots(devices: str | None = None, workers: int | None = None) -> list[Slot]:
    """The place of every worker.

    Args:
        devices: GPUs by number or UUID, one worker each: "0,1,3"; "0+1,2+3" gives a worker two; "all" gives one worker
            all that there are. "cpu", or another of torch's devices that need no number. Default every GPU that torch
            sees, else the CPU with a worker per core.
        workers: how many there are; more than there are devices share them in turn.

    Raises:
        InputError: no such GPU, or fewer than one worker.
    """
    if workers is not None:
        check_count("workers", workers)
    places = _places(devices)
    count = workers or (available_cores() if places[0].device == "cpu" else len(places))
    threads = None if count == 1 else max(1, available_cores() // count)
    return [Slot(place.device, place.gpus, threads) for place in (places[k % len(places)] for k in range(count))]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _places(devices: str | None) -> list[Slot]:
    if devices is not None and devices != "all" and devices.isalpha():
        return [Slot(devices, "")]
    visible = visible_gpus()
    if devices == "all" and not visible:
        raise InputError("devices is 'all', and torch sees no GPU; name them, such as 0+1, or cpu")
    if devices is None:
        return [Slot("cuda", gpu) for gpu in visible] or [Slot("cpu")]
    groups = ["+".join(visible)] if devices == "all" else devices.split(",")
    named = [gpu for group in groups for gpu in group.split("+")]
    unknown = [gpu for gpu in named if not gpu or (visible and gpu not in visible)]
    if unknown or len(set(named)) < len(named):
        choice = ", ".join(visible) if visible else "none that torch sees"
        raise InputError(
            f"devices is {devices!r}; write GPUs, each once, such as 0,1 or 0+1,2+3 (+ joins those of one worker), "
            f"all, or cpu; there are {choice}"
        )
    return [Slot("cuda", group.replace("+", ",")) for group in groups]


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES would name them. Starts no CUDA here."""
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def here(slot: Slot) -> Slot:
    """The place as this process, which sees all of its GPUs, has to call it."""
    if slot.device != "cuda" or slot.gpus is None:
        return slot
    visible, gpu = visible_gpus(), slot.gpus.partition(",")[0]
    return Slot(f"cuda:{visible.index(gpu)}" if gpu in visible else "cuda", slot.gpus, slot.threads)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
