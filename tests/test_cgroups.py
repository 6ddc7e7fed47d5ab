"""-g, --cgroup: the processes of control groups, in the hierarchies that this machine has."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import machines
import psutil
import pytest
from conftest import (
    TREE,
    fails,
    inside,
    meanwhile,
    measured,
    needs_root,
    ready,
    reported,
    run_memuse,
    simulated,
    wait_for,
)

pytestmark = needs_root
NAME = f"memuse-test-{os.getpid()}"


# ---- Groups ---------------------------------------------------------------------


def hierarchies() -> dict[str, Path]:
    """Where v2 and a v1 hierarchy are mounted."""
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split()
        # Of v1, one in which no group needs anything set before it takes processes.
        if kind == "cgroup2" or (kind == "cgroup" and "pids" in options.split(",")):
            mounts[kind] = Path(mount.split()[4])
    return mounts


@contextmanager
def made(mount: Path | None, name: str = NAME) -> Iterator[Path]:
    """A control group, of which nothing is left afterwards."""
    if not mount:
        pytest.skip("this machine has no such hierarchy")
    group = mount / name
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    try:
        yield group
    finally:
        for directory, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):  # a threaded group shows none
                put(mount, *map(int, Path(directory, "cgroup.procs").read_text().split()))
            wait_for(lambda directory=directory: removed(directory))  # type: ignore[misc]


def removed(directory: str) -> bool:
    """Until the last process has left it for good, a group is busy."""
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@pytest.fixture(params=["cgroup2", "cgroup"])
def each(request: Any) -> Iterator[Path]:
    """A group of v2, and one of v1."""
    with made(hierarchies().get(request.param)) as group:
        yield group


@pytest.fixture
def v2() -> Iterator[Path]:
    with made(hierarchies().get("cgroup2")) as group:
        yield group


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of either."""
    with made(next(iter(hierarchies().values()), None)) as group:
        yield group


class Family(NamedTuple):
    parent: int
    children: list[int]


@pytest.fixture
def family(request: Any) -> Iterator[Family]:
    """A parent with three children, in no group of ours; it ends before groups do."""
    with ready(TREE, 3) as process:
        children = sorted(child.pid for child in psutil.Process(process.pid).children())
        yield Family(process.pid, children)


def put(group: Path, *pids: int) -> None:
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))


def inner(group: Path, name: str, *pids: int) -> Path:
    (group / name).mkdir(parents=True)
    put(group / name, *pids)
    return group / name


def tree_of(*arguments: object) -> list[tuple[int, int]]:
    report = measured(*arguments)
    assert report["total"]["frames"] == sum(row["unique"] for row in report["processes"]) > 0
    return [(row["pid"], row["depth"]) for row in report["processes"]]


# ---- Who is in it ---------------------------------------------------------------


def test_members_only_and_not_what_is_below_them(each: Path, family: Family) -> None:
    put(each, family.parent)
    assert tree_of("-g", NAME) == [(family.parent, 0)]
    put(each, family.children[1])
    assert tree_of("--cgroup", NAME) == [(family.parent, 0), (family.children[1], 1)]


def test_members_without_their_parents_are_roots_by_pid(group: Path, family: Family) -> None:
    put(group, *reversed(family.children))
    assert tree_of("-g", NAME) == [(pid, 0) for pid in family.children]


def test_groups_below_count_and_the_group_may_have_no_process_itself(
    each: Path, family: Family
) -> None:
    first, second, third = family.children
    inner(each, "a", first)
    inner(each, "b/c", second)
    inner(each, "b/d", family.parent)
    inner(each, "empty")
    assert tree_of("-g", NAME) == [(family.parent, 0), (first, 1), (second, 1)]
    assert tree_of("-g", f"{NAME}/b") == [(family.parent, 0), (second, 1)]
    assert tree_of("-g", f"{NAME}/b/c") == [(second, 0)]
    assert tree_of("-g", f"{NAME}/b/c", "-g", f"{NAME}/a") == [(first, 0), (second, 0)]
    assert third not in [pid for pid, _ in tree_of("-g", NAME)]


def test_pids_besides_are_in_the_same_set_with_all_below_them(group: Path, family: Family) -> None:
    first, second, third = family.children
    put(group, second)
    with ready(TREE, 1) as other:
        (child,) = psutil.Process(other.pid).children()
        assert tree_of("-g", NAME, other.pid) == [(other.pid, 0), (child.pid, 1), (second, 0)]
    whole = [(family.parent, 0), (first, 1), (second, 1), (third, 1)]
    assert tree_of("-g", NAME, family.parent) == whole
    put(group, family.parent)
    assert tree_of("-g", NAME, first) == [(family.parent, 0), (first, 1), (second, 1)]


def test_frames_of_several_groups_are_counted_once(group: Path, family: Family) -> None:
    first, second, _ = family.children
    inner(group, "a", first)
    inner(group, "b", second)
    alone = [measured("-g", f"{NAME}/{name}")["total"]["frames"] for name in "ab"]
    together = measured("-g", f"{NAME}/a", "-g", f"{NAME}/b", "-g", NAME)["total"]["frames"]
    assert max(alone) <= together < sum(alone)


# ---- How it is named ------------------------------------------------------------


def test_a_group_is_named_as_the_kernel_and_the_file_system_name_it(
    each: Path, family: Family, tmp_path: Path
) -> None:
    put(each, family.parent)
    lines = Path(f"/proc/{family.parent}/cgroup").read_text().splitlines()
    (shown,) = [line.split(":", 2)[2] for line in lines if NAME in line]
    expected = [(family.parent, 0)]
    for path in (shown, NAME, f"/{NAME}", f"{NAME}/", each, f"{each}/"):
        assert tree_of("-g", path) == expected, path
    result = run_memuse("--json", "-g", ".", cwd=each)
    assert [row["pid"] for row in json.loads(result.stdout)["processes"]] == [family.parent]


class Mounts(machines.Here):
    """A machine whose hierarchies are folders: of v2, and of v1 the ones that are named."""

    def __init__(self, root: Path, *v1: str) -> None:
        self.root, self.v1 = root, v1

    def read(self, path: str, directory: Any = None, at_most: int = -1) -> bytes:
        if path != "/proc/self/mounts":
            return super().read(path, directory, at_most)
        lines = [f"cgroup {self.root}/{name} cgroup rw,{name} 0 0" for name in self.v1]
        return "\n".join([*lines, f"cgroup2 {self.root}/v2 cgroup2 rw 0 0\n"]).encode()

    def group(self, path: str, *pids: int) -> Path:
        (self.root / path).mkdir(parents=True)
        (self.root / path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        return self.root / path

    def found(self, text: str) -> list[int]:
        report = reported(inside(self, "--json", "-o", "pid", "-g", text))
        return [row["pid"] for row in report["processes"]]


ID = "3f2a9c" * 10 + "beef"


@pytest.mark.parametrize(
    "text",
    ["nginx.service", "nginx", "ngin", ID, ID[:12], "0::/system.slice/nginx.service",
     "4:memory:/system.slice/nginx.service", "system.slice/nginx.service/cgroup.procs"],
)  # fmt: skip
def test_a_part_of_a_groups_name_is_enough(text: str, family: Family, tmp_path: Path) -> None:
    machine = Mounts(tmp_path, "memory")
    nginx, container, _ = family.children
    machine.group("v2")
    machine.group("v2/system.slice")
    machine.group("v2/system.slice/nginx.service", nginx)
    machine.group(f"memory/docker/{ID}", container)
    assert machine.found(text) == [container if ID.startswith(text) else nginx]


def test_a_whole_name_goes_before_a_part_of_another(family: Family, tmp_path: Path) -> None:
    machine = Mounts(tmp_path)
    machine.group("v2/a/my-nginx.service", family.children[0])
    machine.group("v2/a/nginx.service", family.children[1])
    assert machine.found("nginx.service") == [family.children[1]]
    line = fails(inside(machine, "-g", "nginx"))
    several = "/a/my-nginx.service, /a/nginx.service"
    assert line == f"memuse: 2 control groups have 'nginx' in their names: {several}\n"
    for number in range(9):
        machine.group(f"v2/{number}-nginx", family.children[0])
    line = fails(inside(machine, "-g", "nginx"), "11 control groups have 'nginx'")
    assert line.endswith(": /0-nginx, /1-nginx, /2-nginx, /3-nginx, /4-nginx, ...\n")


def test_of_hierarchies_that_have_the_name_the_one_with_members_counts(
    family: Family, tmp_path: Path
) -> None:
    first, second, _ = family.children
    machine = Mounts(tmp_path, "cpu", "memory")
    machine.group("v2/x")
    machine.group("memory/x", first)
    assert machine.found("x") == [first]
    machine.group("cpu/x", first)
    assert machine.found("x") == [first]  # the same
    (tmp_path / "v2/x/cgroup.procs").write_text(f"{first}\n{second}\n")
    for text in ("x", "/x", "0::/x"):
        line = fails(inside(machine, "-g", text))
        directories = ", ".join(f"{tmp_path}/{name}/x" for name in ("v2", "cpu", "memory"))
        said = f"{text!r} has other processes in each of {directories}: name one of these"
        assert line == f"memuse: {said}\n"
    assert machine.found(f"{tmp_path}/v2/x") == [first, second]


def test_members_that_come_between_two_hierarchies_are_no_difference(
    family: Family, tmp_path: Path
) -> None:
    first, second, _ = family.children

    class Coming(Mounts):
        def before_opening(self, path: str) -> None:
            if path == f"{tmp_path}/memory/x/cgroup.procs":
                for name in ("v2", "memory"):
                    (tmp_path / name / "x/cgroup.procs").write_text(f"{first}\n{second}\n")

    machine = Coming(tmp_path, "memory")
    machine.group("v2/x", first)
    machine.group("memory/x", first)
    assert machine.found("x") == [first, second]


def test_v2_and_v1_of_this_machine(family: Family) -> None:
    mounts = hierarchies()
    with made(mounts.get("cgroup2")) as new, made(mounts.get("cgroup")) as old:
        put(old, family.parent)
        assert tree_of("-g", NAME) == [(family.parent, 0)]
        put(new, family.parent)
        assert tree_of("-g", NAME[2:]) == [(family.parent, 0)]
        put(new, family.children[0])
        fails(inside(None, "-g", NAME), str(old), str(new))


def test_a_slash_is_the_whole_machine(forked: int) -> None:
    result = run_memuse("--json", "-o", "pid,command", "-g", "/")
    pids = [row["pid"] for row in json.loads(result.stdout)["processes"]]
    assert {1, os.getpid(), forked} <= {*pids}
    assert len(pids) == len({*pids})
    assert not [
        line for line in result.stderr.splitlines() if "exited while being read" not in line
    ]


# ---- What the kernel charges to it ----------------------------------------------


@pytest.mark.parametrize("name", ["memory.current", "memory.usage_in_bytes"])
def test_total_tells_what_the_kernel_charges(name: str, family: Family, tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{family.parent}\n")
    (tmp_path / name).write_text(f"{617 << 20}\n")
    for option, words in (
        ("", "KiB, 1 process, memory.current 631808"),
        ("-b", "bytes, 1 process, memory.current 646971392"),
        ("-h", "1 process, memory.current 617M"),
    ):
        options = (option,) if option else ()
        result = inside(None, *options, "-g", tmp_path)
        assert result.stdout.splitlines()[-1].endswith(f" {words}")
    assert measured("-g", tmp_path)["memory_current"] == 617 << 20
    # It is no figure of a set that has more in it.
    for more in ((family.children[0],), ("-g", tmp_path)):
        assert "memory_current" not in measured("-g", tmp_path, *more)
        assert "memory.current" not in inside(None, "-g", tmp_path, *more).stdout
    (tmp_path / name).unlink()
    assert "memory_current" not in measured("-g", tmp_path)


def test_the_charge_is_of_the_hierarchy_that_has_one(family: Family, tmp_path: Path) -> None:
    """On a hybrid machine v2 has the processes, too, and v1 the controller."""
    machine = Mounts(tmp_path, "pids", "memory")
    for name in ("v2", "pids", "memory"):
        machine.group(f"{name}/x", family.parent)
    (tmp_path / "memory/x/memory.usage_in_bytes").write_text("4096\n")
    assert reported(inside(machine, "--json", "-g", "x"))["memory_current"] == 4096


# ---- What can go wrong ----------------------------------------------------------


@pytest.mark.parametrize("path", ["no/such/group", "/no/such/group", "/etc", "/etc/passwd"])
def test_a_group_that_is_not_there(path: str) -> None:
    for arguments in ((), (os.getpid(),)):
        where = "cat /proc/PID/cgroup shows a process's"
        said = f"memuse: there is no control group {path!r}; {where}\n"
        assert fails(inside(None, "-g", path, *arguments)) == said


def test_a_groups_name_reaches_no_terminal_as_it_is() -> None:
    fails(inside(None, "-g", "a\x1b[2J\nb"), "a\\x1b[2J\\nb")


@pytest.mark.parametrize("text", ["", ".", "./", "..", "..."])
def test_no_name_is_not_the_whole_machine(text: str) -> None:
    """As from a shell's variable that is not set."""
    said = f"memuse: {text!r} is no control group; -g / is the whole machine\n"
    assert fails(inside(None, "-o", "pid", "-g", text)) == said


def test_a_group_without_a_process(each: Path) -> None:
    (each / "inner").mkdir()
    assert fails(inside(None, "-g", NAME)) == f"memuse: the control group {NAME!r} has no process\n"
    fails(inside(None, "-g", NAME, os.getpid()), "has no process")


THREADS = """
import os, threading
threading.Thread(target=os.read, args=(0, 1)).start()
print("ready", flush=True)
"""


def test_a_threaded_group_is_refused_and_the_one_above_it_has_its_processes(v2: Path) -> None:
    with ready(THREADS) as process:
        put(v2, process.pid)
        (v2 / "threads").mkdir()
        (v2 / "threads/cgroup.type").write_text("threaded")
        (tid,) = {t.id for t in psutil.Process(process.pid).threads()} - {process.pid}
        (v2 / "threads/cgroup.threads").write_text(str(tid))
        fails(inside(None, "-g", f"{NAME}/threads"), f"{v2}/threads/cgroup.procs", "threaded")
        assert tree_of("-g", NAME) == [(process.pid, 0)]


def test_a_group_that_refuses(group: Path, family: Family) -> None:
    put(group, family.parent)
    result = simulated("Refusing EACCES cgroup.procs", "-g", NAME)
    fails(result, f"{group}/cgroup.procs", "Permission denied")


@pytest.mark.parametrize("content", ["1 x", "\u00b2", "{}"])
def test_a_list_of_processes_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text(content)
    said = f"memuse: {tmp_path}/cgroup.procs has something else than PIDs\n"
    assert fails(inside(None, "-g", tmp_path)) == said


# ---- Members that come and go ---------------------------------------------------


def test_members_that_go_before_all_are_listed_are_no_error(group: Path, family: Family) -> None:
    put(group, family.parent)
    with ready(TREE, 0) as other:
        put(group, other.pid)
        stops = f"1 before:/proc/{family.parent}/stat"
        result = meanwhile(lambda _: end(other), stops, "--json", "-g", NAME)
    assert (result.returncode, result.stderr) == (0, "")
    assert [row["pid"] for row in json.loads(result.stdout)["processes"]] == [family.parent]


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_groups_that_go_while_they_are_read_are_no_error(group: Path, family: Family) -> None:
    first, second, _ = family.children
    put(group, first)
    below = inner(group, "inner")
    put(below, second)

    def remove(_: int) -> None:
        put(group, second)
        wait_for(lambda: removed(str(below)))

    result = meanwhile(remove, f"1 before:{below}/cgroup.procs", "--json", "-g", NAME)
    assert (result.returncode, result.stderr) == (0, "")
    assert first in [row["pid"] for row in json.loads(result.stdout)["processes"]]


def test_a_member_that_exits_while_it_is_read_is_counted_as_such(
    group: Path, family: Family
) -> None:
    with ready(TREE, 0) as other:
        put(group, family.parent, other.pid)
        result = meanwhile(
            lambda _: end(other), "1 before:/proc/self/pagemap", "--json", "-g", NAME
        )
    assert result.stderr == "memuse: 1 process exited while being read\n"
    assert result.returncode == 0
    assert [row["pid"] for row in json.loads(result.stdout)["processes"]] == [family.parent]


def test_if_all_members_have_gone_that_is_told(group: Path) -> None:
    with ready(TREE, 0) as other:
        put(group, other.pid)
        result = meanwhile(lambda _: end(other), f"1 after:/proc/{other.pid}/stat", "-g", NAME)
        fails(result, "none of the processes is left")


# Children that live for a moment, and have children of their own.
SHORT_LIVED = """
import os
print("ready", flush=True)
while True:
    for _ in range(4):
        if os.fork() == 0:
            os.fork()
            os._exit(0)
    for _ in range(4):
        os.wait()
"""


def test_members_that_come_and_go_all_the_time(each: Path) -> None:
    with ready(SHORT_LIVED) as process:
        put(each, process.pid)
        for _ in range(5):
            result = inside(None, "--json", "-g", NAME)
            assert re.fullmatch("(memuse: [0-9]+ process(es)? exited [^\n]+\n)?", result.stderr)
            assert result.returncode == 0
            rows = json.loads(result.stdout)["processes"]
            assert process.pid in [row["pid"] for row in rows]
