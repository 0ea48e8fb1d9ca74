"""Let several processes, started by ``torchrun`` or ``accelerate launch``, work on one block at a time.

Whatever a process computes depends on what is computed and not on how many processes there are: samples are summed up in
:data:`LOTS` lots, the sums of each half of the lots are added in their order, and the rows of a matrix are searched in parts that
the matrix alone decides. So any number of processes gives the same bytes, as long as each has the same number of threads and the same hardware.
"""

from __future__ import annotations

import fcntl
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

from compress.errors import CompressError

T = TypeVar("T")
R = TypeVar("R")
_ENDED = "lock-ended"  # there once a process has said that another is no more
_TRIES = 50  # tenths of a second
LOTS = 8
"""Lots that samples are divided into; more processes than lots gain nothing where samples are shared out."""
_HALF = LOTS // 2
_SMALL = 1 << 20  # bytes of a tensor that goes in one message with others


def processes(device: torch.device) -> PartialState:
    """Tell who is at work; usually one process. Of the device only the type matters."""
    threads = torch.get_num_threads()  # accelerate 1.15 may set more (findings/threads_by_accelerate.sh)
    first = not dist.is_initialized()
    found = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))  # a pass may take that long
    if first:
        found.wait_for_everyone()  # one that ends at once, as after an error, takes along what others still connect by
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    return found


class _Stopped(BaseException):
    """Raised where the launcher stops this process, as it does when another has ended."""


@contextmanager
def _stopped_by_exception() -> Iterator[None]:
    """Raise :class:`_Stopped` at SIGTERM, for the length of a ``with``; after an exception it is ignored, so that what is wrong gets said."""
    if current_thread() is not main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


def _held(path: Path) -> bool:
    """Tell whether a process holds the lock on a file."""
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass(frozen=True)
class Ranks:
    """Say which of how many processes this is; one alone by default.

    Every method that gives something to others is to be called by all processes, in the same order.

    Attributes:
        rank: number of this process; 0 is the main one, which writes.
        size: how many there are.
        device: where what they tell one another has to lie.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def at_work(cls, device: torch.device) -> Ranks:
        """Find out, for work on a device."""
        team = processes(device)
        return cls(team.process_index, team.num_processes, str(team.device))

    @property
    def main(self) -> bool:
        """Tell whether this process writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def together(self, folder: Path) -> Iterator[None]:
        """Work with the others for the length of a ``with``; where one of them ends before, name it.

        Each holds a lock on a file of its own in a folder that all can see, which the system releases when a process ends.

        Raises:
            CompressError: another process has ended, or this one is told to stop; said by the first to find out, while the
                rest exit.
        """
        if self.size == 1:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"lock-rank-{self.rank}").open("w") as own:
            try:
                with _stopped_by_exception():
                    fcntl.flock(own, fcntl.LOCK_EX)
                    if self.main:
                        (folder / _ENDED).unlink(missing_ok=True)
                    self.wait()
                    yield
            except CompressError as error:
                raise error if self.main else CompressError(f"rank {self.rank}: {error}") from error
            except (RuntimeError, _Stopped) as error:
                ended = self._ended(folder)
                if not ended and isinstance(error, RuntimeError):
                    raise
                try:
                    (folder / _ENDED).touch(exist_ok=False)
                except FileExistsError:
                    sys.exit(1)
                who = f"rank {ended[0]} of {self.size} has ended" if ended else f"rank {self.rank}: told to stop"
                raise CompressError(
                    f"{who} before the work was done; what is finished is kept: run again, with any number of processes."
                ) from error

    def _ended(self, folder: Path) -> list[int]:
        """Find the processes that are no more; one that has just gone may take a moment to be."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        for _ in range(_TRIES):
            if ended := [rank for rank in others if not _held(folder / f"lock-rank-{rank}")]:
                return ended
            time.sleep(0.1)
        return []

    def lots(self, count: int) -> list[range]:
        """Return the samples of every lot of this process, places among ``count``; as many lots for all, some without a sample.

        Each of two processes has one half of the lots, which it need not tell the other before the end.
        """
        own = range(self.rank, -(-LOTS // self.size) * self.size, self.size)
        if self.size == 2:
            own = range(self.rank * _HALF, self.rank * _HALF + _HALF)
        edges = [count * lot // LOTS for lot in range(LOTS + 1)]
        return [range(edges[lot], edges[lot + 1]) if lot < LOTS else range(0) for lot in own]

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """Return the names of this process's work, the largest pieces dealt out first, each to who has the least so far."""
        loads = [0.0] * self.size
        own = []
        for name in sorted(costs, key=lambda name: -costs[name]):  # equal ones in their order
            to = loads.index(min(loads))
            loads[to] += costs[name]
            if to == self.rank:
                own.append(name)
        return [name for name in costs if name in own]

    def over(self, parts: Sequence[T], work: Callable[[T], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Do some work on parts of like size, each in one process, on a CPU in one of its threads.

        Returns what every part gave, in their order.
        """
        places = range(self.rank, len(parts), self.size)
        count = len(parts) if torch.device(self.device).type == "cpu" else 1
        done = _in_threads(work, [parts[place] for place in places], count)
        own = {f"{place} {name}": value for place, of in zip(places, done, strict=True) for name, value in of.items()}
        found: list[dict[str, Tensor]] = [{} for _ in parts]
        for label, tensor in self.joined(own).items():
            place, _, name = label.partition(" ")
            found[int(place)][name] = tensor
        return found

    def each(self, tensors: Mapping[str, Tensor], note: Any = None) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Yield what every process gives, in the order of their ranks: tensors by name, and something that JSON can say."""
        for source in range(self.size):
            if source == self.rank:
                self._tell(source, tensors, note)
                yield dict(tensors), note
            else:
                yield self._hear(source)

    def joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all processes."""
        return {name: tensor for theirs, _ in self.each(tensors) for name, tensor in theirs.items()}

    def noted(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """Return what all processes note, by name."""
        return {name: value for _, theirs in self.each({}, note) for name, value in theirs.items()}

    def _tell(self, source: int, tensors: Mapping[str, Tensor], note: Any) -> None:
        if self.size == 1:
            return
        flat = {
            name: tensor.contiguous().to(self.device).view(-1).view(torch.uint8) for name, tensor in tensors.items()
        }
        there = {name: [str(t.dtype)[6:], list(t.shape), t.device.type] for name, t in tensors.items()}  # less "torch."
        header = torch.tensor(list(json.dumps([there, note]).encode()), dtype=torch.uint8, device=self.device)
        small = torch.cat([header, *[values for values in flat.values() if len(values) <= _SMALL]])
        dist.broadcast(torch.tensor([len(header), len(small)], device=self.device), source)
        dist.broadcast(small, source)
        for values in flat.values():
            if len(values) > _SMALL:
                dist.broadcast(values, source)

    def _hear(self, source: int) -> tuple[dict[str, Tensor], Any]:
        sizes = torch.zeros(2, dtype=torch.long, device=self.device)
        dist.broadcast(sizes, source)
        at, size = sizes.tolist()
        small = torch.empty(size, dtype=torch.uint8, device=self.device)
        dist.broadcast(small, source)
        there, note = json.loads(bytes(small[:at].tolist()))
        tensors = {}
        for name, (label, shape, kind) in there.items():
            dtype = getattr(torch, label)
            size = math.prod(shape) * dtype.itemsize
            if size <= _SMALL:
                values, at = small[at : at + size].clone(), at + size  # a copy is aligned
            else:
                values = torch.empty(size, dtype=torch.uint8, device=self.device)
                dist.broadcast(values, source)
            tensor = values.view(dtype).view(shape)
            tensors[name] = tensor.to(kind) if kind != torch.device(self.device).type else tensor
        return tensors, note


ALONE = Ranks()


def _in_threads(work: Callable[[T], R], parts: Sequence[T], count: int) -> list[R]:
    """Do some work on parts at once, each with its share of torch's threads, which are for ``count`` parts of all processes."""
    threads, learns = torch.get_num_threads(), torch.is_grad_enabled()
    if min(threads, count) < 2:
        return [work(part) for part in parts]

    def done(part: T) -> R:
        torch.set_num_threads(max(1, threads // count))  # of this thread, and of those that begin later
        with torch.set_grad_enabled(learns):
            return work(part)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(done, parts))
    finally:
        torch.set_num_threads(threads)


class Sums:
    """Sum tensors by name over samples in lots: each half of the lots in their order, and then the two halves.

    Attributes:
        lot: the sums of the lot at hand, to be added to in place.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.lot: dict[str, Tensor] = {}
        self._halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self._notes: tuple[list[Any], list[Any]] = [], []
        self._total: dict[str, Tensor] | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor, which may be kept and written to."""
        _add(self.lot, {name: value})

    def end_lot(self, note: Any = None) -> None:
        """Add the lots that the processes have at hand to those before; all call it as often, and note what JSON can say."""
        assert self._total is None, "the sums have been asked for"
        if self._ranks.size == 2:
            self._take(self._ranks.rank, self.lot, note)
        else:
            for lot, theirs in self._ranks.each(self.lot, note):
                self._take(min(1, sum(map(len, self._notes)) // _HALF), lot, theirs)
        self.lot = {}

    def _take(self, half: int, lot: Mapping[str, Tensor], note: Any) -> None:
        _add(self._halves[half], lot)
        self._notes[half].append(note)

    @property
    def total(self) -> dict[str, Tensor]:
        """Return the sums of all lots, once they have ended; all processes ask for them the first time."""
        if self._total is None:
            assert not self.lot, "a lot has not ended"
            self._total = {}
            halves = list(zip(self._halves, self._notes, strict=True))
            if self._ranks.size == 2:
                halves = list(self._ranks.each(*halves[self._ranks.rank]))
            for half, _ in halves:
                _add(self._total, half)
            self._halves, self._notes = ({}, {}), (halves[0][1], halves[1][1])
        return self._total

    @property
    def notes(self) -> list[Any]:
        """Return the notes of all lots in their order; to be asked for as :attr:`total` is."""
        _ = self.total
        return [note for notes in self._notes for note in notes]


def _add(total: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add tensors to those of their names, in place, or put them where there are none."""
    for name, value in values.items():
        if name in total:
            total[name] += value
        else:
            total[name] = value


def even_parts(rows: int, most: int, fewest: int = 4, least: int = 48) -> list[slice]:
    """Divide rows evenly into parts of at most ``most``: a multiple of ``fewest`` of them where each then has ``least`` rows."""
    count = max(-(-rows // most), 1)
    if rows >= fewest * least:
        count = -(-count // fewest) * fewest
    edges = [rows * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]
