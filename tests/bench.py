"""How long memuse takes, beside the least that one thread needs to read the page tables.

    python tests/bench.py [--rounds N] [--scale F] [SCENE ...]
    python tests/bench.py --growth
    python tests/bench.py --smoke

Run it as root, on a machine with 6 GiB to spare and nothing else to do.  Each scene is built
from real processes.  Then these run in turn, in every round, and the tables show medians:

floor    a bare program of one thread reads smaps, and the pagemap of every VMA that has
         anything in it, and throws it away; without the start of Python
memuse   memuse --json: its wall time less startup, the wall time of the same on one `sleep`
gentle   memuse --json -o pid,frames,unique,command, which reads no smaps; likewise
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
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import scenes

HERE = Path(__file__).resolve().parent
PAGE = mmap.PAGESIZE
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
MEMUSE = [sys.executable, str(HERE.parent / "memuse.py"), "--json"]
GENTLE = [*MEMUSE, "-o", "pid,frames,unique,command"]
IMPORT = [sys.executable, "-c", "import psutil, argparse, json"]
INTERPRETER = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
LIMIT = 300  # seconds for any one command

kept: list[mmap.mmap] = []  # what a scene mapped would go with its last reference


# ---- The scenes, built in a process of their own ------------------------------------


def memory_of(size: float, flags: int = scenes.ANON) -> mmap.mmap:
    """Memory of pages of one size only, untouched."""
    memory = mmap.mmap(-1, max(64, int(size) // PAGE) * PAGE, flags=flags)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(scenes.MADV_NOHUGEPAGE)
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
        scenes.fork(lambda own=own: write(memory, own))  # type: ignore[misc]


def cow(scale: float) -> None:
    memory = memory_of(2 * GIB * scale)
    pages = all_pages(memory)
    write(memory, random.sample(pages, len(pages)))

    def child() -> None:
        random.seed(os.getpid())
        write(memory, random.sample(pages, len(pages) // 10))

    for _ in range(8):
        scenes.fork(child)


def shm(scale: float) -> None:
    """Each process leaves another hundredth of the pages out, at random."""
    memory = memory_of(GIB * scale, scenes.SHARED)
    pages = all_pages(memory)

    def child() -> None:
        random.seed(os.getpid())
        left_out = set(random.sample(pages, len(pages) // 100))
        write(memory, (page for page in pages if page not in left_out))

    child()
    for _ in range(16):
        scenes.fork(child)


def many(scale: float) -> None:
    """Interpreters of their own, not forks; this process is one of them."""
    count = max(2, int(200 * scale)) - 1
    started = [subprocess.Popen(INTERPRETER, stdout=subprocess.PIPE) for _ in range(count)]
    for process in started:
        assert process.stdout
        process.stdout.read(1)
        scenes.children.append(process.pid)


def vmas(scale: float) -> None:
    count = max(64, int(65_000 * scale))
    address = scenes.map_memory(count * PAGE)
    scenes.write(address, range(count))
    for page in range(0, count, 2):  # no two of one protection side by side
        if scenes.libc.mprotect(address + page * PAGE, PAGE, mmap.PROT_READ):
            raise OSError("mprotect failed: is vm.max_map_count below 65530?")


def sparse(scale: float) -> None:
    memory = memory_of(8 * TIB * scale, scenes.ANON | scenes.MAP_NORESERVE)
    pages = all_pages(memory)
    write(memory, pages[:: len(pages) // 256][:256])


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
            scenes.unmap(scenes.map_memory(PAGE), PAGE)
            worst = max(worst, time.perf_counter() - start)
            time.sleep(0.0001)
        if select.select([0], [], [], 0)[0]:
            if not os.read(0, 1):
                os._exit(0)
            print(worst, flush=True)
            worst = 0.0


# Ceilings of the time (see scene_row) and of the peak RSS in MiB.
CEILINGS = {
    "private": (1.0, 40),
    "fork": (0.9, 64),
    "cow": (1.2, 64),
    "shm": (0.9, 64),
    "many": (1.2, 40),
    "vmas": (1.5, 64),
    "sparse": (0.3, 40),
    "startup": (1.5, 24),
}


def build(name: str, scale: float) -> None:
    """One of the functions above, and then stand still."""
    globals()[name](scale)
    print("ready", flush=True)
    scenes.stand_still()


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


def run(command: list[str]) -> tuple[float, bytes]:
    """The command's wall time and output."""
    start = time.perf_counter()
    limited = ["timeout", str(LIMIT), *command]
    with subprocess.Popen(limited, stdout=subprocess.PIPE, cwd=HERE) as process:
        output = process.stdout.read() if process.stdout else b""
    seconds = time.perf_counter() - start
    if process.returncode:
        raise failed(process.returncode, command)
    return seconds, output


def failed(status: int, command: list[str]) -> SystemExit:
    return SystemExit(f"exit status {status}: {' '.join(command)[:200]}")


def peak_mib(command: list[str]) -> float:
    """Its peak RSS in MiB, and its children's on top, though these share a part of it."""
    peaks: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=HERE) as process:
        ended, status = 0, 0
        until = time.monotonic() + LIMIT
        while not ended:
            if time.monotonic() > until:
                process.kill()
            with suppress(OSError, IndexError):  # it has ended
                for child in (
                    Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                ):
                    text = Path(f"/proc/{child}/status").read_text()
                    peaks[child] = int(text.partition("VmHWM:")[2].split()[0])
            time.sleep(0.001)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise failed(process.returncode, command)
    return (usage.ru_maxrss + sum(peaks.values())) / 1024


def floor_command(pids: list[int], only_smaps: bool = False) -> list[str]:
    return [sys.executable, "-c", f"import bench; bench.floor({pids}, {only_smaps})"]


def median(values: list[float]) -> float:
    """Without statistics, whose imports would raise this process's own peak RSS."""
    return sorted(values)[len(values) // 2]


def measure(name: str, scale: float, rounds: int, sleeper: int) -> dict[str, float]:
    """Medians by name: seconds, and what else memuse's report and rusage tell."""
    print(f"{name} x {scale:g}", file=sys.stderr)
    if name == "startup":
        return measure_tree(sleeper, rounds, sleeper, with_floor=False)
    with standing(name, scale) as process:
        return measure_tree(process.pid, rounds, sleeper, with_floor=name != "sparse")


def measure_tree(pid: int, rounds: int, sleeper: int, with_floor: bool) -> dict[str, float]:
    values = defaultdict(list)
    for _ in range(rounds):
        seconds, output = run([*MEMUSE, str(pid)])
        rows = json.loads(output)["processes"]
        pids = [row["pid"] for row in rows]
        values["memuse"].append(seconds)
        values["peak MiB"].append(peak_mib([*MEMUSE, str(pid)]))
        values["processes"].append(len(rows))
        values["pages"].append(sum(row["frames"] for row in rows))
        if with_floor:
            values["floor"].append(float(run(floor_command(pids))[1]))
        commands = {
            "startup": [*MEMUSE, str(sleeper)],
            "gentle": [*GENTLE, str(pid)],
            "gentle startup": [*GENTLE, str(sleeper)],
            "import": IMPORT,
            "smem": ["smem"],
            "ps_mem": ["ps_mem", "-p", ",".join(map(str, pids))],
            "smemstat": ["smemstat", "-p", ",".join(map(str, pids))],
        }
        for label, command in commands.items():
            if shutil.which(command[0]):
                values[label].append(run(command)[0])
    return {label: median(each) for label, each in values.items()}


def worst_waits(scale: float, rounds: int) -> list[list[str]]:
    """Rows on the worst waits of the victim while commands run."""
    print(f"victim x {scale:g}", file=sys.stderr)
    with standing("victim", scale) as process:
        commands = {
            "undisturbed for a second": ["sleep", "1"],
            "floor, its smaps alone": floor_command([process.pid], only_smaps=True),
            "floor": floor_command([process.pid]),
            "memuse": [*MEMUSE, str(process.pid)],
            "gentle": [*GENTLE, str(process.pid)],
        }
        waits = defaultdict(list)
        for _ in range(rounds):
            for label, command in commands.items():
                ask(process)
                run(command)
                waits[label].append(1000 * ask(process))
    return [[label, f"{median(ms):.1f}", f"{max(ms):.1f}"] for label, ms in waits.items()]


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


def net(result: dict[str, float], wall: str = "memuse", startup: str = "startup") -> float:
    return result[wall] - result[startup]


def scene_row(name: str, result: dict[str, float]) -> list[str]:
    """The ceilings of sparse and startup are of their own kind."""
    ceiling, peak_ceiling = CEILINGS[name]
    row = [name, f"{result['processes']:.0f}", f"{result['pages']:,.0f}"]
    memory = [f"{result['peak MiB']:.0f}", f"{peak_ceiling}"]
    if name == "startup":
        ratio = times(result["startup"], result["import"])
        row += [f"{result['import']:.3f} (import)", f"{result['startup']:.3f} (all)", ratio]
        return [*row, f"{ceiling}", f"{result['gentle startup']:.3f} (all)", "-", *memory]
    seconds, gentle = net(result), net(result, "gentle", "gentle startup")
    if name == "sparse":
        row += ["-", f"{seconds:.3f}", "-", f"{ceiling} s"]
    else:
        ratio = times(seconds, result["floor"])
        row += [f"{result['floor']:.3f}", f"{seconds:.3f}", ratio, f"{ceiling}"]
    return [*row, f"{gentle:.3f}", times(seconds, gentle), *memory]


def report_scenes(names: list[str], scale: float, rounds: int, sleeper: int) -> None:
    results = {name: measure(name, scale, rounds, sleeper) for name in names}
    print_table(
        "scene, processes, pages, floor s, memuse s, ratio, ceiling,"
        " gentle s, speedup, peak MiB, ceiling MiB",
        [scene_row(name, result) for name, result in results.items()],
    )
    peers = [peer for peer in ("smem", "ps_mem", "smemstat") if shutil.which(peer)]
    if peers:
        print_table(
            ", ".join(["whole commands, memuse s", *(f"{peer} s" for peer in peers)]),
            [
                [name, *(f"{result[label]:.2f}" for label in ["memuse", *peers])]
                for name, result in results.items()
            ],
        )
    startup, imports = (
        median([result[label] for result in results.values()]) for label in ("startup", "import")
    )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"startup: {startup:.3f} s, {times(startup, imports)} x import's {imports:.3f} s")
    print(f"A peak below {own:.0f} MiB, this benchmark's own, is shown as that.\n")


def report_growth(scale: float, rounds: int, sleeper: int) -> None:
    rows = []
    for name in ("private", "shm", "many"):
        for part in (0.25, 0.5, 1.0):
            result = measure(name, scale * part, rounds, sleeper)
            seconds, processes, pages = net(result), result["processes"], result["pages"]
            row = [name, f"{processes:.0f}", f"{pages:,.0f}", f"{seconds:.3f}"]
            row += [f"{1e9 * seconds / pages:.0f}", f"{1e3 * seconds / processes:.2f}"]
            rows.append([*row, f"{result['peak MiB']:.1f}"])
    print_table("scene, processes, pages, memuse s, ns/page, ms/process, peak MiB", rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=", ".join([*CEILINGS, "victim"]))
    parser.add_argument("--rounds", type=int, default=5, help="of every command, 5 by default")
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 by default, less is smaller")
    parser.add_argument("--growth", action="store_true", help="three sizes of three scenes")
    parser.add_argument("--smoke", action="store_true", help="a part of it, tiny and once")
    options = parser.parse_args(argv)
    names = options.scenes or [*CEILINGS, "victim"]
    if options.smoke:
        options.rounds, options.scale = 1, 1 / 256
        names = options.scenes or ["fork", "vmas", "sparse", "startup", "victim"]
    unknown = set(names) - {*CEILINGS, "victim"}
    if unknown or options.rounds < 1 or not 0 < options.scale <= 1:
        parser.error(f"unknown scenes {sorted(unknown)}, or a number out of range")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that is begun ends
    with subprocess.Popen(["sleep", "3600"]) as sleeper:
        try:
            trees = [name for name in names if name != "victim"]
            if options.growth:
                report_growth(options.scale, options.rounds, sleeper.pid)
            elif trees:
                report_scenes(trees, options.scale, options.rounds, sleeper.pid)
            if "victim" in names and not options.growth:
                rows = worst_waits(options.scale, options.rounds)
                print_table("victim's worst wait, median ms, worst ms", rows)
        finally:
            sleeper.kill()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
