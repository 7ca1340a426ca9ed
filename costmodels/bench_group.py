"""Several GPUs of this machine at once: collectives, by torch.distributed with one process a device.

    Group(4).read("all_reduce", elements=1 << 20, devices=2)

The process that measures holds no device here: it tells every rank the next step and waits for all answers.
So ranks cannot differ in what they skip, how many calls a graph holds and how often it is replayed, and none
waits for another that never comes: who dies, refuses or keeps silent ends the group, which is then started
afresh, and what broke it is not asked again.

A step of its own makes the operands, so that a device without room for them refuses before anybody waits. In
front of every timed replay all ranks meet on the device; of each replay the slowest rank counts, of those the
median. Messages are counted as tables do, in elements of the whole message: what is reduced, or the parts
of all ranks together. Point to point is half of there and back, as the next stage of a pipeline waits for all
of a message. Ranks are devices of one machine; nothing here speaks of links between nodes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from costmodels.bench_timing import calls_in_graph, captured, gpu_seconds, reason, replays_of
from costmodels.profile import GROUPS

#: Seconds that a step may take (the first of a group makes its communicator), and that the others have left
#: once a rank has refused.
_PATIENCE_S, _GRACE_S = 120.0, 5.0


class _Member(NamedTuple):
    process: BaseProcess
    pipe: Connection


class Group:
    """Processes, one for each of the first `size` devices, that start when first needed.

    `backend`, `device`: torch.distributed's backend and the kind of device, `nccl` and `cuda` for GPUs.
    """

    def __init__(
        self, size: int, backend: str = "nccl", device: str = "cuda", patience_s: float = _PATIENCE_S
    ) -> None:
        self.size, self.backend, self.device, self.patience_s = size, backend, device, patience_s
        self._members: list[_Member] = []
        self._broken: dict[tuple[str, int], str] = {}
        self._end: Callable[[], object] = lambda: None

    def read(self, kind: str, elements: int, devices: int) -> float:
        """Seconds of one collective of `elements` of 2 bytes over the first `devices` ranks.

        RuntimeError says why it could not run.
        """
        if devices > self.size:
            raise RuntimeError(f"{devices} devices are needed, and there are {self.size}")
        for key in (("", 0), (kind, devices)):
            if key in self._broken:
                raise RuntimeError(self._broken[key])
        if not self._members:
            self._start()
        try:
            self._ask(devices, "hold", kind, elements, devices)
            once = float(max(self._ask(devices, "warm")))
            calls = calls_in_graph(once)
            times = self._ask(devices, "measure", calls, replays_of(once * calls))
        except RuntimeError as error:
            if not self._members:
                self._broken[kind, devices] = str(error)
            raise
        return statistics.median(float(max(ranks)) for ranks in zip(*times, strict=True))

    def close(self) -> None:
        """End all processes, whatever they do."""
        self._members = []
        self._end()

    def _start(self) -> None:
        # Not fork: a process that has used a GPU cannot be forked.
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp(prefix="planfront-")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, rank, self.size, self.backend, self.device, folder, self.patience_s),
                daemon=True,
            )
            process.start()
            there.close()  # or the end of the process would not end the pipe
            self._members.append(_Member(process, here))
        self._end = weakref.finalize(self, _kill, list(self._members), folder)
        try:
            self._answers(self._members)
        except RuntimeError as error:
            self.close()
            self._broken["", 0] = str(error)
            raise

    def _ask(self, devices: int, step: str, *given: object) -> list[Any]:
        """What each of the first ranks answers. RuntimeError if one refuses; ends the group if not all are
        ready for the next step."""
        members = self._members[:devices]
        for member in members:
            with suppress(OSError):  # it is dead, as its pipe says below
                member.pipe.send((step, given))
        return self._answers(members)

    def _answers(self, members: Sequence[_Member]) -> list[Any]:
        ranks = {member.pipe: rank for rank, member in enumerate(members)}
        answers: dict[int, Any] = {}
        refusals: dict[int, str] = {}
        until = time.monotonic() + self.patience_s

        def first() -> str:
            return refusals[min(refusals)] if refusals else ""

        while ranks:
            ready = wait(list(ranks), max(0.0, until - time.monotonic()))
            if not ready:
                silent = ", ".join(str(rank) for rank in ranks.values())
                self.close()
                raise RuntimeError(first() or f"no answer from rank {silent} for {self.patience_s:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = ranks.pop(pipe)
                try:
                    good, answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    process = members[rank].process
                    process.join(_GRACE_S)
                    self.close()
                    raise RuntimeError(
                        first() or f"the process of rank {rank} ended ({process.exitcode})"
                    ) from None
                if not good:
                    refusals[rank] = f"rank {rank}: {answers[rank]}"
                    until = min(until, time.monotonic() + _GRACE_S)
        if refusals:
            raise RuntimeError(first())
        return [answers[rank] for rank in sorted(answers)]


def _kill(members: Sequence[_Member], folder: str) -> None:
    for member in members:
        member.process.kill()
    for member in members:
        member.process.join()
        member.pipe.close()
    shutil.rmtree(folder, ignore_errors=True)


def _serve(
    pipe: Connection, rank: int, size: int, backend: str, device: str, folder: str, patience_s: float
) -> None:
    """A rank's process: does what it is told until the pipe ends."""
    # An interruption at the terminal reaches all processes; the one that measures ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(folder,), daemon=True).start()
    try:
        worker = _Rank(rank, size, backend, device, folder, patience_s)
        pipe.send((True, None))
        while True:
            step, given = pipe.recv()
            try:
                pipe.send((True, getattr(worker, step)(*given)))
            except Exception as error:
                worker.drop()
                pipe.send((False, reason(error)))
    except (EOFError, OSError):
        pass
    except Exception as error:
        with suppress(OSError):
            pipe.send((False, reason(error)))
    os._exit(0)  # taking a group down in order would wait for ranks that may be gone


def _leave_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


class _Rank:
    """One device of a group, and the steps of a measurement on it."""

    def __init__(
        self, rank: int, size: int, backend: str, device: str, folder: str, patience_s: float
    ) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist, self.rank = torch, dist, rank
        self.on_gpu = device == "cuda"
        self.device = f"cuda:{rank}" if self.on_gpu else device
        if self.on_gpu:
            torch.cuda.set_device(rank)
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
        else:
            torch.set_num_threads(1)
        # A file: all ranks are on this machine, and no port can be taken by somebody else.
        dist.init_process_group(
            backend,
            init_method=(Path(folder) / "meeting").as_uri(),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=patience_s),
        )
        # Every rank takes part in the making of every group, its own or not.
        self.groups = {
            count: dist.group.WORLD if count == size else dist.new_group(list(range(count)))
            for count in sorted({*GROUPS, size})
            if count <= size
        }
        self.group, self.meeting = dist.group.WORLD, torch.zeros(1, device=self.device)
        self.call: Callable[[], object] = lambda: None
        self.share = 1.0  # of a call's time that counts

    def hold(self, kind: str, elements: int, devices: int) -> None:
        """Make a collective's operands; nothing is sent."""
        self.drop()
        dist, group = self.dist, self.groups[devices]
        part = max(1, elements // devices)
        sizes = {
            "all_reduce": (elements, 0),
            "all_gather": (part * devices, part),
            "reduce_scatter": (part * devices, part),
            "all_to_all": (part * devices, part * devices),
            "point_to_point": (elements, 0),
        }
        # Zeros: a sum made again and again stays finite.
        whole, other = (
            self.torch.zeros(size, device=self.device, dtype=self.torch.float16) for size in sizes[kind]
        )
        # Their names up to PyTorch 2.12, and since.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "all_gather": lambda: gather(whole, other, group=group),
            "reduce_scatter": lambda: scatter(other, whole, group=group),
            "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
            "point_to_point": lambda: self._there_and_back(whole, group),
        }
        self.group, self.call = group, calls[kind]
        self.share = 0.5 if kind == "point_to_point" else 1.0
        self._synchronize()

    def warm(self) -> float:
        """Seconds of one call, launched alone."""
        for _ in range(2):
            self.call()
        return self._seconds(self.call)

    def measure(self, calls: int, replays: int) -> list[float]:
        """Seconds per collective of each replay of so many calls."""

        def launch() -> None:
            for _ in range(calls):
                self.call()

        # The thread that watches over NCCL may ask the driver things that a capture of all threads forbids.
        replay = captured(self.torch, launch, "thread_local").replay if self.on_gpu else launch
        times = [self._seconds(replay) for _ in range(1 + replays)]
        self.drop()
        return [seconds * self.share / calls for seconds in times[1:]]

    def drop(self) -> None:
        """Let go of the operands, so that other kernels find the memory free."""
        self.call = lambda: None
        if self.on_gpu:
            with suppress(RuntimeError):
                self.torch.cuda.empty_cache()

    def _there_and_back(self, message: Any, group: Any) -> None:
        dist, other = self.dist, 1 - self.rank
        for sender in (0, 1):
            send = dist.isend if self.rank == sender else dist.irecv
            # As a batch it runs in the group's own communicator, as collectives do.
            for work in dist.batch_isend_irecv([dist.P2POp(send, message, other, group)]):
                work.wait()

    def _seconds(self, work: Callable[[], object]) -> float:
        """Time of what `work` does on this device from when all ranks have met."""
        self.dist.all_reduce(self.meeting, group=self.group)
        if self.on_gpu:
            return gpu_seconds(self.torch, work)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()
