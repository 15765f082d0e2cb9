"""Deaths of loader processes: known by the processes, whatever error PyTorch raises."""

import faulthandler
import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data import DataLoader

from maskformer_fast.data import worker
from maskformer_fast.data.worker import WorkerDied, iterate_over, worker_death, worker_deaths_explained


def wait(seconds):
    faulthandler.disable()  # no report of the signals below
    time.sleep(seconds)


class Loader:
    """Loader of one process that yields 1 and then fails, after an action on its process."""

    def __init__(self, act, error, target=wait):
        self.act, self.error, self.target = act, error, target

    def __iter__(self):
        self.process = multiprocessing.get_context("fork").Process(target=self.target, args=(60,), daemon=True)
        self.process.start()
        return self._items()

    def _items(self):
        yield 1
        self.act(self.process)
        raise self.error


def signalled(number):
    return lambda process: os.kill(process.pid, number)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), ValueError("truncated"),
                                   RuntimeError("DataLoader worker (pid 7) exited unexpectedly"), OSError("shm")])
def test_any_error_with_a_dead_process_is_its_death(error):
    with pytest.raises(WorkerDied, match=r"was killed by SIGKILL.*OOM killer.*fewer --data\.workers") as raised:
        list(iterate_over(Loader(signalled(signal.SIGKILL), error)))
    assert raised.value.__cause__ is error


def test_a_bus_error_is_explained_by_shared_memory():
    with pytest.raises(WorkerDied, match=r"SIGBUS.*--shm-size"):
        list(iterate_over(Loader(signalled(signal.SIGBUS), EOFError())))


def test_a_signal_that_comes_while_the_process_is_asked_hides_nothing(monkeypatch):
    """PyTorch's handler of SIGCHLD raises in the main thread, here at the first look at the process."""
    find, calls = worker._death, []

    def interrupted(workers):
        calls.append(workers)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return find(workers)

    monkeypatch.setattr(worker, "_death", interrupted)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        list(iterate_over(Loader(signalled(signal.SIGKILL), ConnectionResetError(104, "reset"))))


def test_a_signal_that_comes_after_the_loader_s_error_is_the_death_as_well(monkeypatch):
    """PyTorch's handler of SIGCHLD takes the place of the explained error, which has already left the loader."""

    def interrupted(workers):
        (process,) = workers
        process.join(10)
        raise KeyError("raised between two lines")

    monkeypatch.setattr(worker, "_wait_for_death", interrupted)
    with pytest.raises(WorkerDied, match="SIGKILL") as raised, worker_deaths_explained():
        list(iterate_over(Loader(signalled(signal.SIGKILL), ConnectionResetError(104, "reset"))))
    assert isinstance(raised.value.__cause__, KeyError)
    list(iterate_over(DataLoader(range(5))))
    assert worker_death(EOFError()) is None, "the next loader begins without the dead of the last"


def test_a_process_that_ends_by_itself_is_named_with_its_status():
    with pytest.raises(WorkerDied, match="ended with status 7"):
        list(iterate_over(Loader(lambda process: None, EOFError(), target=lambda _: os._exit(7))))


@pytest.mark.parametrize("error", [EOFError("of a file"), RuntimeError("DataLoader worker (pid 7) is killed")])
def test_an_error_with_living_processes_passes_unchanged_whatever_its_text(error, monkeypatch):
    monkeypatch.setattr("maskformer_fast.data.worker._PATIENCE", 0.1)
    loader = Loader(lambda process: None, error)
    with pytest.raises(type(error)) as raised:
        list(iterate_over(loader))
    loader.process.kill()
    assert raised.value is error


def test_a_death_that_is_noticed_outside_the_loader_is_known_while_the_loader_runs():
    loader = DataLoader(range(100), num_workers=1)
    others = set(multiprocessing.active_children())  # of tests before this one
    with pytest.raises(WorkerDied, match="SIGKILL"), worker_deaths_explained():
        items = iterate_over(loader)
        next(items)
        assert worker_death(RuntimeError("x")) is None
        (victim,) = set(multiprocessing.active_children()) - others
        try:
            victim.kill()
            time.sleep(10)  # interrupted by PyTorch's handler of SIGCHLD, as a step of training is
        except RuntimeError:
            victim.join(10)
            raise
    items.close()
    assert worker_death(RuntimeError("x")) is None


def test_a_complete_iteration_leaves_nothing_to_report():
    assert len(list(iterate_over(DataLoader(range(5), num_workers=2)))) == 5
    assert len(list(iterate_over(DataLoader(range(5))))) == 5
    assert worker_death(EOFError()) is None
