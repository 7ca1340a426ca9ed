"""Collectives over real processes: meeting, agreement, the slowest rank, who dies; on CPUs by gloo."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from costmodels.bench_group import Group, _Rank
from costmodels.profile import COLLECTIVES, Reading, Row, profile

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

#: What gloo has in every version of PyTorch; the others it may refuse, with its reason.
ALWAYS = ("all_reduce", "all_gather", "point_to_point")


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    group = Group(4, "gloo", "cpu", patience_s=60.0)
    yield group
    group.close()


def _pids(group: Group) -> list[int]:
    return [member.process.pid for member in group._members]


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_every_collective_runs_over_some_and_over_all_ranks(group: Group, kind: str, devices: int) -> None:
    if kind == "point_to_point" and devices > 2:
        pytest.skip("a pair is a pair")
    try:
        seconds, refusal = group.read(kind, 4096, devices), ""
    except RuntimeError as error:
        seconds, refusal = 1.0, str(error)
    assert 1e-7 < seconds < 5.0
    assert not refusal or (kind not in ALWAYS and refusal.startswith("rank 0: ")), refusal


@pytest.mark.slow
def test_more_bytes_take_longer(group: Group) -> None:
    small, large = (group.read("all_reduce", elements, 2) for elements in (256, 1 << 22))
    assert large > 2 * small


def test_more_devices_than_there_are_refuse(group: Group) -> None:
    with pytest.raises(RuntimeError, match="8 devices are needed, and there are 4"):
        group.read("all_reduce", 256, 8)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no limits of other processes here")
def test_all_skip_what_one_has_no_room_for_and_go_on(group: Group) -> None:
    group.read("all_reduce", 256, 4)
    pids = _pids(group)
    used = int(Path(f"/proc/{pids[2]}/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    limits = resource.prlimit(pids[2], resource.RLIMIT_AS)
    resource.prlimit(pids[2], resource.RLIMIT_AS, (used + (32 << 20), limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"^rank 2: RuntimeError: .*memory"):
            group.read("all_gather", 1 << 26, 4)
    finally:
        resource.prlimit(pids[2], resource.RLIMIT_AS, limits)
    assert group.read("all_gather", 256, 4) > 0
    assert _pids(group) == pids


@pytest.mark.slow
def test_a_rank_that_dies_ends_its_group_and_the_next_shape_starts_another() -> None:
    group = Group(2, "gloo", "cpu", patience_s=60.0)
    group.read("all_gather", 256, 2)
    pids = _pids(group)
    # A second and more of work, in the midst of which one dies.
    killer = threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 0: |the process of rank 1 ended \(-9\)"):
        group.read("all_reduce", 1 << 27, 2)
    assert time.monotonic() - start < 30.0
    assert all(_gone(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="rank"):
        group.read("all_reduce", 256, 2)
    assert not group._members, "what broke a group is not tried again"
    assert group.read("all_gather", 256, 2) > 0
    assert not set(pids) & set(_pids(group))
    group.close()


@pytest.mark.slow
def test_nobody_waits_for_ever_for_a_rank_that_keeps_silent() -> None:
    group = Group(2, "gloo", "cpu", patience_s=40.0)
    group.read("all_reduce", 256, 2)
    group.patience_s = 1.5
    os.kill(_pids(group)[1], signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"no answer from rank 1 for 1\.5 s"):
        group.read("all_gather", 256, 2)
    assert not group._members


@pytest.mark.slow
def test_a_group_that_cannot_start_says_why_and_is_not_tried_again() -> None:
    group = Group(2, "no such backend", "cpu", patience_s=60.0)
    with pytest.raises(RuntimeError, match=r"rank 0: \w+Error: .*no such backend") as first:
        group.read("all_reduce", 256, 2)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as second:
        group.read("all_gather", 256, 2)
    assert str(first.value) == str(second.value)
    assert time.monotonic() - start < 0.1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ranks_leave_when_who_measures_is_killed() -> None:
    script = (
        "from costmodels.bench_group import Group\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        "    group = Group(2, 'gloo', 'cpu')\n"
        "    group.read('all_reduce', 256, 2)\n"
        "    print(*(member.process.pid for member in group._members), flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(word) for word in child.stdout.readline().split()]
    assert len(pids) == 2
    child.kill()
    child.wait()
    child.stdout.close()
    until = time.monotonic() + 20.0
    while time.monotonic() < until and not all(_gone(pid) for pid in pids):
        time.sleep(0.05)
    assert all(_gone(pid) for pid in pids)


class Scripted(Group):
    """A group whose ranks answer as told: how times become one."""

    def __init__(self, once: list[float], times: list[list[float]]) -> None:
        super().__init__(len(once))
        self.answers: dict[str, Any] = {"hold": [None] * len(once), "warm": once, "measure": times}
        self.asked: list[tuple[Any, ...]] = []

    def _start(self) -> None:
        pass

    def _ask(self, devices: int, step: str, *given: object) -> list[Any]:
        self.asked.append((step, *given))
        return list(self.answers[step])


def test_the_slowest_rank_of_each_replay_counts_and_of_replays_the_median() -> None:
    group = Scripted([1e-5, 4e-5], [[1e-5, 9e-5, 2e-5], [3e-5, 1e-5, 1e-5]])
    assert group.read("all_reduce", 1024, 2) == 3e-5
    # The slowest rank's first call says how many a graph holds, and that how often it is replayed: for all.
    assert group.asked == [("hold", "all_reduce", 1024, 2), ("warm",), ("measure", 50, 10)]


class Sizes:
    """In place of torch.distributed: how many elements a collective is given to fill and to send."""

    def __init__(self) -> None:
        self.seen: tuple[int, ...] = ()

    def all_reduce(self, whole: Any, group: object) -> None:
        self.seen = (whole.numel(),)

    def all_gather_into_tensor(self, out: Any, given: Any, group: object) -> None:
        self.seen = (out.numel(), given.numel())

    reduce_scatter_tensor = all_to_all_single = all_gather_into_tensor


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("all_reduce", (1024,)),
        ("all_gather", (1024, 256)),
        ("reduce_scatter", (256, 1024)),
        ("all_to_all", (1024, 1024)),
    ],
)
def test_a_message_is_the_whole_of_it_as_in_the_published_tables(kind: str, sizes: tuple[int, ...]) -> None:
    rank = object.__new__(_Rank)
    seen = Sizes()
    rank.torch, rank.dist, rank.device, rank.on_gpu = torch, seen, "cpu", False
    rank.groups = {4: None}
    rank.hold(kind, 1024, 4)
    rank.call()
    assert seen.seen == sizes


class Cpus:
    """CPUs in place of GPUs: the group is real, the device's name is not."""

    device, software, source = "NVIDIA H100 80GB HBM3", "torch-0", "gloo"
    communication, devices = "nccl-0.0.1", 2

    def __init__(self, group: Group) -> None:
        self.group, self.asked = group, 0
        self.refused: dict[str, str] = {}

    def read(self, family: str, shape: Row, sustained: bool = False) -> Reading | None:
        self.asked += 1
        if self.asked == 7:
            raise KeyboardInterrupt
        return Reading(self.group.read(shape["kind"], shape["message_size"], shape["num_gpus"]))


@pytest.mark.slow
def test_measured_messages_become_a_table_that_goes_on_and_that_training_reads(tmp_path: Path) -> None:
    from costmodels.learned.data_curves import collective_tables

    shapes: list[tuple[str, Row]] = [
        ("nccl", {"nccl_dtype": "half", "num_gpus": 2, "message_size": size, "kind": kind})
        for kind in ("all_reduce", "point_to_point")
        for size in (256 << power for power in range(8))
    ]
    group = Group(2, "gloo", "cpu", patience_s=60.0)
    bench = Cpus(group)
    try:
        with pytest.raises(KeyboardInterrupt):
            profile(tmp_path, bench, shapes=shapes)
        assert profile(tmp_path, bench, shapes=shapes) == {"nccl": 16}
        assert bench.asked == 17
    finally:
        group.close()
    (path,) = tmp_path.rglob("nccl_perf.csv")
    assert path.parent == tmp_path / "h100-sxm-80gb" / "comm" / "nccl" / "nccl-0.0.1"
    curves = {key: (size, seconds) for key, _, size, seconds, _ in collective_tables(tmp_path)}
    assert set(curves) == {f"h100-sxm-80gb/nccl/{kind}/2" for kind in ("all_reduce", "point_to_point")}
    size, seconds = curves["h100-sxm-80gb/nccl/all_reduce/2"]
    assert (size[0], size[-1]) == (512.0, 65536.0)
    assert (seconds > 1e-7).all()
