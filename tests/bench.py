"""How long memuse takes, beside the least that one thread needs to read the page tables.

    python tests/bench.py [--rounds N] [--scale F] [--beside MEMUSE_PY] [SCENE ...]
    python tests/bench.py --growth
    python tests/bench.py --smoke

Run it as root, on a machine with 6 GiB to spare and nothing else to do.  Each scene is built
from real processes.  Then these run in turn, in every round, and the tables show medians:

floor    a bare program of one thread reads smaps, and the pagemap of every VMA that has
         anything in it, and throws it away; without the start of Python
memuse   memuse PID: its wall time less startup, the wall time of the same on one `sleep`
gentle   memuse -o pid,frames,unique,command PID, which reads no smaps; likewise
beside   another version of memuse.py, likewise
import   python -c "import psutil, argparse, json", to compare startup with
peers    smem (it has no choice of PIDs), ps_mem and smemstat where installed: wall time

The scene `victim` is another matter: a process times its own mmap and munmap meanwhile.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import building

HERE = Path(__file__).resolve().parent
PAGE = mmap.PAGESIZE
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
MEMUSE = [sys.executable, str(HERE.parent / "memuse.py")]
GENTLE = [*MEMUSE, "-o", "pid,frames,unique,command"]
IMPORT = [sys.executable, "-c", "import psutil, argparse, json"]
INTERPRETER = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
TIME_LIMIT = 300  # seconds for any one command

kept: list[mmap.mmap] = []  # what a scene mapped would go with its last reference


# ---- The scenes, built in a process of their own ------------------------------------


def memory_of(size: float, flags: int = building.ANON) -> mmap.mmap:
    """Memory of pages of one size only, untouched."""
    memory = mmap.mmap(-1, max(64, int(size) // PAGE) * PAGE, flags=flags)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(building.MADV_NOHUGEPAGE)
    kept.append(memory)
    return memory


def all_pages(memory: mmap.mmap) -> range:
    return range(len(memory) // PAGE)


def write(memory: mmap.mmap, pages: Iterable[int]) -> None:
    for page in pages:
        memory[page * PAGE] = 1


def private(scale: float) -> None:
    memory = memory_of(4 * GIB * scale)
    write(memory, all_pages(memory))


def fork(scale: float) -> None:
    memory = memory_of(2 * GIB * scale)
    pages = all_pages(memory)
    write(memory, pages)
    part = len(pages) // 32
    for child in range(8):
        own = pages[child * part : (child + 1) * part]
        building.fork(lambda own=own: write(memory, own))  # type: ignore[misc]


def cow(scale: float) -> None:
    memory = memory_of(2 * GIB * scale)
    pages = all_pages(memory)
    write(memory, random.sample(pages, len(pages)))

    def child() -> None:
        random.seed(os.getpid())
        write(memory, random.sample(pages, len(pages) // 10))

    for _ in range(8):
        building.fork(child)


def shm(scale: float) -> None:
    """Each process leaves another hundredth of the pages out, at random."""
    memory = memory_of(GIB * scale, building.SHARED)
    pages = all_pages(memory)

    def child() -> None:
        random.seed(os.getpid())
        left_out = set(random.sample(pages, len(pages) // 100))
        write(memory, (page for page in pages if page not in left_out))

    child()
    for _ in range(16):
        building.fork(child)


def many(scale: float) -> None:
    """Interpreters of their own, not forks; this process is one of them."""
    count = max(2, int(200 * scale)) - 1
    started = [subprocess.Popen(INTERPRETER, stdout=subprocess.PIPE) for _ in range(count)]
    for process in started:
        assert process.stdout
        process.stdout.read(1)
        building.children.append(process.pid)


def vmas(scale: float) -> None:
    count = max(64, int(65_000 * scale))
    address = building.map_memory(count * PAGE)
    building.write(address, range(count))
    for page in range(0, count, 2):  # no two of one protection side by side
        if building.libc.mprotect(address + page * PAGE, PAGE, mmap.PROT_READ):
            raise OSError("mprotect failed: is vm.max_map_count below 65530?")


def sparse(scale: float) -> None:
    memory = memory_of(8 * TIB * scale, building.ANON | building.MAP_NORESERVE)
    pages = all_pages(memory)
    write(memory, pages[:: len(pages) // 256][:256])


def one_shm(scale: float) -> None:
    """One process with shared memory."""
    memory = memory_of(GIB * scale, building.SHARED)
    write(memory, all_pages(memory))


def strewn(scale: float) -> None:
    """17 pages in every 16 MiB of 32 GiB, forked once."""
    memory = memory_of(32 * GIB * scale, building.ANON | building.MAP_NORESERVE)
    pages, step = all_pages(memory), 16 * MIB // PAGE
    write(memory, (start + i * step // 17 for start in pages[::step] for i in range(17)))
    building.fork()


def crowd(scale: float) -> None:
    """Small processes, which all have a part of their memory from this one."""
    for _ in range(int(3000 * scale)):
        building.fork()


def prefork(scale: float) -> None:
    """A parent and 16 children, each of which wrote to a third of its memory, at random."""
    memory = memory_of(512 * MIB * scale)
    pages = all_pages(memory)
    write(memory, pages)

    def child() -> None:
        random.seed(os.getpid())
        write(memory, random.sample(pages, len(pages) // 3))

    for _ in range(16):
        building.fork(child)


def backends(scale: float) -> None:
    """A database's shared memory, of which each process touched some pages, at random."""
    memory = memory_of(256 * MIB * scale, building.SHARED)
    pages = all_pages(memory)

    def child() -> None:
        random.seed(os.getpid())
        write(memory, random.sample(pages, len(pages) * 3 // 100))

    for _ in range(max(2, int(200 * scale))):
        building.fork(child)


def victim(scale: float) -> None:
    """Tell on request how long mmap and munmap of a page took at worst since the last time.

    The pauses leave the processor to others, so that the waits are for the lock.
    """
    private(scale)
    print("ready", flush=True)
    worst = 0.0
    while True:
        for _ in range(20):
            start = time.perf_counter()
            building.unmap(building.map_memory(PAGE), PAGE)
            worst = max(worst, time.perf_counter() - start)
            time.sleep(0.0001)
        if select.select([0], [], [], 0)[0]:
            if not os.read(0, 1):
                os._exit(0)
            print(worst, flush=True)
            worst = 0.0


# Limits of the time (see scene_row) and of the peak RSS in MiB.
LIMITS: dict[str, tuple[float | None, int | None]] = {
    "private": (0.7, 40),
    "fork": (0.75, 64),
    "cow": (0.95, 64),
    "shm": (0.65, 64),
    "many": (0.9, 40),
    "vmas": (0.4, 64),
    "sparse": (0.05, 40),
    "one_shm": (None, None),
    "strewn": (None, 64),
    "prefork": (1.2, None),
    "backends": (None, None),
    "crowd": (None, None),
    "startup": (1.4, 24),
}


def build(name: str, scale: float) -> None:
    """One of the functions above, and then stand still."""
    globals()[name](scale)
    print("ready", flush=True)
    building.stand_still()


@contextmanager
def standing(name: str, scale: float) -> Iterator[subprocess.Popen[str]]:
    """The scene's process, once it is ready; the end of its standard input ends it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", f"import bench; bench.build({name!r}, {scale})"],
        stdin=pipe,
        stdout=pipe,
        text=True,
        start_new_session=True,
        cwd=HERE,
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"the scene {name} could not be built")
            yield process
        finally:
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else is in it


# ---- The floor ----------------------------------------------------------------------


def floor(pids: list[int], only_smaps: bool = False) -> None:
    """Read, throw away, and print the seconds that the reading took."""
    start = time.perf_counter()
    for pid in pids:
        with open(f"/proc/{pid}/smaps", "rb", buffering=0) as file:
            smaps = file.read()
        if only_smaps:
            continue
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        for first, last in spans_in_use(smaps):
            for offset in range(first, last, MIB):
                os.pread(pagemap, min(MIB, last - offset), offset)
        os.close(pagemap)
    print(time.perf_counter() - start)


def spans_in_use(smaps: bytes) -> Iterator[tuple[int, int]]:
    """Where pagemap has the VMAs with anything in Rss, Swap or the hugetlb fields."""
    header = rb"^([0-9a-f]+)-([0-9a-f]+) "
    field = rb"^(?:Rss|Swap|Shared_Hugetlb|Private_Hugetlb): +[1-9]"
    span = last = (0, 0)
    for match in re.finditer(header + rb"|" + field, smaps, re.MULTILINE):
        if match[1]:
            span = (int(match[1], 16) // PAGE * 8, int(match[2], 16) // PAGE * 8)
        elif span != last:
            yield span
            last = span


# ---- Measuring ----------------------------------------------------------------------


class Run(NamedTuple):
    """One run of a command: seconds of wall time and of the processors, and its peak RSS."""

    wall: float
    cpu: float
    peak_mib: float
    output: bytes


def run(command: list[str]) -> Run:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE) as process:
        alarm = threading.Timer(TIME_LIMIT, process.kill)
        alarm.start()
        output = process.stdout.read() if process.stdout else b""
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        alarm.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)[:200]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def floor_command(pids: list[int], only_smaps: bool = False) -> list[str]:
    return [sys.executable, "-c", f"import bench; bench.floor({pids}, {only_smaps})"]


class Medians(NamedTuple):
    """By what was run: medians of seconds, and of the peak; and what the scene consists of."""

    wall: dict[str, float]
    cpu: dict[str, float]
    peak_mib: dict[str, float]
    processes: int
    pages: int


def measure(name: str, options: argparse.Namespace, sleeper: int) -> Medians:
    print(f"{name} x {options.scale:g}", file=sys.stderr)
    if name == "startup":
        return measure_tree(sleeper, options, sleeper, with_floor=False)
    with standing(name, options.scale) as process:
        return measure_tree(process.pid, options, sleeper, with_floor=name != "sparse")


def measure_tree(pid: int, options: argparse.Namespace, sleeper: int, with_floor: bool) -> Medians:
    columns = ["--json", "-o", "pid,frames", str(pid)]
    rows = json.loads(run([*MEMUSE, *columns]).output)["processes"]
    pids = [row["pid"] for row in rows]
    commands = {
        "memuse": [*MEMUSE, str(pid)],
        "startup": [*MEMUSE, str(sleeper)],
        "gentle": [*GENTLE, str(pid)],
        "gentle startup": [*GENTLE, str(sleeper)],
    }
    if pid == sleeper:
        commands["import"] = IMPORT
    if options.beside:
        commands["beside"] = [sys.executable, options.beside, str(pid)]
        commands["beside startup"] = [sys.executable, options.beside, str(sleeper)]
    if with_floor:
        commands["floor"] = floor_command(pids)
    listed = ",".join(map(str, pids))
    peers = {
        "smem": ["smem"],
        "ps_mem": ["ps_mem", "-p", listed],
        "smemstat": ["smemstat", "-p", listed],
    }
    commands |= {peer: command for peer, command in peers.items() if shutil.which(peer)}
    runs = defaultdict(list)
    for _ in range(options.rounds):
        for label, command in commands.items():
            done = run(command)
            if label == "floor":
                done = done._replace(wall=float(done.output))
            runs[label].append(done)
    medians = [
        {
            label: statistics.median(getattr(each, name) for each in done)
            for label, done in runs.items()
        }
        for name in ("wall", "cpu", "peak_mib")
    ]
    wall, cpu, peak = medians
    return Medians(wall, cpu, peak, len(rows), sum(row["frames"] for row in rows))


def worst_waits(options: argparse.Namespace) -> list[list[str]]:
    """Rows on the worst waits of the victim while commands run."""
    print(f"victim x {options.scale:g}", file=sys.stderr)
    with standing("victim", options.scale) as process:
        commands = {
            f"undisturbed for {options.pause} s": ["sleep", str(options.pause)],
            "floor, its smaps alone": floor_command([process.pid], only_smaps=True),
            "floor": floor_command([process.pid]),
            "memuse": [*MEMUSE, str(process.pid)],
            "gentle": [*GENTLE, str(process.pid)],
        }
        waits = defaultdict(list)
        for _ in range(options.rounds):
            for label, command in commands.items():
                ask(process)
                run(command)
                waits[label].append(1000 * ask(process))
    return [
        [label, f"{statistics.median(ms):.1f}", f"{max(ms):.1f}"] for label, ms in waits.items()
    ]


def ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin
    assert process.stdout
    process.stdin.write("?")
    process.stdin.flush()
    return float(process.stdout.readline())


# ---- Tables -------------------------------------------------------------------------


def print_table(header: str, rows: list[list[str]]) -> None:
    titles = header.split(", ")
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for row in [titles, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print(flush=True)


def times(value: float, unit: float) -> str:
    return f"{value / unit:.2f}" if min(value, unit) > 0 else "-"  # lost in the noise


def net(seconds: dict[str, float], label: str) -> float:
    """Without startup."""
    return seconds[label] - seconds["startup" if label == "memuse" else f"{label} startup"]


def scene_row(name: str, result: Medians) -> list[str]:
    """The limits of sparse (seconds) and startup (times the imports) are of their own kind."""
    limit, peak_limit = LIMITS[name]
    wall = result.wall
    labels = ["memuse", "gentle", *(["beside"] if "beside" in wall else [])]
    row = [name, f"{result.processes}", f"{result.pages:,}"]
    if name == "startup":
        row.append(f"{wall['import']:.3f} (import)")
        for label in labels:
            row += [f"{wall[label]:.3f} (all)", times(wall[label], wall["import"])]
    else:
        floor = wall.get("floor", 0)
        row.append(f"{floor:.3f}" if floor else "-")
        for label in labels:
            row += [f"{net(wall, label):.3f}", times(net(wall, label), floor)]
    row.insert(6, "-" if limit is None else f"{limit} s" if name == "sparse" else f"{limit}")
    row += [f"{result.peak_mib['memuse']:.0f}", f"{peak_limit or '-'}"]
    return [*row, f"{result.cpu['memuse']:.2f}", f"{result.cpu['gentle']:.2f}"]


def report_scenes(names: list[str], options: argparse.Namespace, sleeper: int) -> None:
    results = {name: measure(name, options, sleeper) for name in names}
    beside = "beside s, ratio, " if options.beside else ""
    print_table(
        "scene, processes, pages, floor s, memuse s, ratio, limit, gentle s, ratio,"
        f" {beside}peak MiB, limit, CPU s, gentle CPU s",
        [scene_row(name, result) for name, result in results.items()],
    )
    peers = [peer for peer in ("smem", "ps_mem", "smemstat") if shutil.which(peer)]
    if peers:
        print_table(
            ", ".join(["whole commands, memuse s", *(f"{peer} s" for peer in peers)]),
            [
                [name, *(f"{result.wall[label]:.2f}" for label in ["memuse", *peers])]
                for name, result in results.items()
            ],
        )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"A peak below {own:.0f} MiB, this benchmark's own, is shown as that.\n")


def report_growth(options: argparse.Namespace, sleeper: int) -> None:
    whole, rows = options.scale, []
    for name in ("private", "shm", "many", "crowd"):
        for part in (0.125, 0.25, 0.5, 1.0):
            options.scale = whole * part
            result = measure(name, options, sleeper)
            seconds, processes, pages = net(result.wall, "memuse"), result.processes, result.pages
            row = [name, f"{processes}", f"{pages:,}", f"{seconds:.3f}"]
            row += [f"{1e9 * seconds / pages:.0f}", f"{1e3 * seconds / processes:.2f}"]
            rows.append([*row, f"{result.peak_mib['memuse']:.1f}"])
    print_table("scene, processes, pages, memuse s, ns/page, ms/process, peak MiB", rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=", ".join([*LIMITS, "victim"]))
    parser.add_argument("--rounds", type=int, default=5, help="of every command, 5 by default")
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 by default, less is smaller")
    parser.add_argument("--beside", metavar="MEMUSE_PY", help="another version, in every round")
    parser.add_argument("--growth", action="store_true", help="four sizes of four scenes")
    parser.add_argument("--smoke", action="store_true", help="a part of it, tiny and once")
    options = parser.parse_args(argv, argparse.Namespace(pause=1))
    names = options.scenes or [*LIMITS, "victim"]
    if options.smoke:
        options.rounds, options.scale, options.pause = 1, 1 / 256, 0.01
        names = options.scenes or ["fork", "vmas", "sparse", "startup", "victim"]
    unknown = set(names) - {*LIMITS, "victim"}
    if unknown or options.rounds < 1 or not 0 < options.scale <= 1:
        parser.error(f"unknown scenes {sorted(unknown)}, or a number out of range")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that is begun ends
    with subprocess.Popen(["sleep", "3600"]) as sleeper:
        try:
            trees = [name for name in names if name != "victim"]
            if options.growth:
                report_growth(options, sleeper.pid)
            elif trees:
                report_scenes(trees, options, sleeper.pid)
            if "victim" in names and not options.growth:
                print_table("victim's worst wait, median ms, worst ms", worst_waits(options))
        finally:
            sleeper.kill()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
