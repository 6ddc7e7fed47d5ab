"""What all tests share: how memuse is run, scenes of real processes, and kernel settings."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
MEMUSE = [sys.executable, str(ROOT / "memuse.py")]
# Imported, for then Python keeps the compiled code.
MACHINES = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})"]
MACHINES[-1] += "; import machines, os; os._exit(machines.main(*sys.argv[1:]))"
sys.path.insert(0, str(ROOT))

KIB, MIB = 1 << 10, 1 << 20
Result = subprocess.CompletedProcess[str]

# Another user; an interpreter may be in a home that is not theirs.
READ_ALL = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *READ_ALL]
# Without what changes the language, the width of lines, or how Python writes.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("LC_", "LANG", "PYTHON", "COLUMNS"))
}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="reading page frames takes root")
slow = pytest.mark.skipif(not os.environ.get("MEMUSE_SLOW"), reason="MEMUSE_SLOW=1 runs it")


def pytest_collection_finish() -> None:
    """What there is by now will stay: let Python not look it through for garbage time and again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Signals as a shell in the foreground has them, whatever started the tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    slow_machine = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any", deadline=None, suppress_health_check=slow_machine)
    hypothesis.settings.load_profile("any")


# ---- Running memuse -------------------------------------------------------------


def run(command: Sequence[object], **options: Any) -> Result:
    """A command's output and status; by default in the clean environment."""
    options = {"capture_output": True, "text": True, "timeout": 120, "env": ENVIRONMENT, **options}
    return subprocess.run([str(word) for word in command], check=False, **options)


def run_memuse(*arguments: object, prefix: Sequence[str] = (), **options: Any) -> Result:
    """Run the command as a user does."""
    return run([*prefix, *MEMUSE, *arguments], **options)


def simulated(machine: str, *arguments: object, **options: Any) -> Result:
    """Run memuse on a machine that is not here: a class of machines.py, and what it takes.

    For example "Refusing ENOENT kpageflags".
    """
    return run([*MACHINES, machine, *arguments], **options)


def inside(machine: Any, *arguments: object, **environment: str) -> Result:
    """Run memuse in this process, on this machine (None) or one that is not here.

    In a fraction of the time that the command takes.  What only another process shows is for
    run_memuse() and simulated(), such as its exit, its streams, or that it leaves itself out.
    """
    import machines

    import memuse

    if isinstance(machine, str):
        machine = machines.named(machine)
    handler = signal.getsignal(signal.SIGINT)
    file = functools.partial(tempfile.TemporaryFile, "w+", encoding="utf-8")
    with file() as output, file() as errors, pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                status = memuse.main([str(word) for word in arguments], machine)
        except SystemExit as end:  # as argparse ends a program
            status = int(end.code or 0)
        finally:
            signal.signal(signal.SIGINT, handler)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([], status, output.read(), errors.read())


def shell(command: str, *arguments: object) -> Result:
    """Run a line of bash in which "$@" is memuse with its arguments."""
    return run(["bash", "-c", command, "bash", *MEMUSE, *arguments])


def measured(*arguments: object) -> dict[str, Any]:
    """memuse's JSON of a run in this process, which is then not outside when FREED is counted."""
    return reported(inside(None, "--json", *arguments))


def measured_apart(*arguments: object) -> dict[str, Any]:
    """memuse's JSON of the whole command."""
    return reported(run_memuse("--json", *arguments))


def reported(result: Result) -> dict[str, Any]:
    """The JSON of a run without a complaint."""
    assert (result.returncode, result.stderr) == (0, "")
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def fails(result: Result, *words: str, status: int = 1) -> str:
    """It failed and said so, with these words, in one line and nowhere else; that line."""
    assert result.stdout == ""
    assert re.fullmatch(r"memuse: [^\n]+\n", result.stderr), result.stderr
    assert result.returncode == status
    for word in words:
        assert word in result.stderr
    return result.stderr


WRONG: set[str] = set()  # the tests that found wrong figures


def has_no_differences(about: str, table: list[str]) -> None:
    """Fail with a table of figures, if there is one, and with what they are of."""
    if table:
        WRONG.add(os.environ["PYTEST_CURRENT_TEST"])
        pytest.fail("\n".join([about, *table]), pytrace=False)


@pytest.fixture
def few_are_wrong() -> None:
    """Once the figures of three tests are wrong, those of others would say nothing new."""
    if len(WRONG) >= 3:
        pytest.skip("three tests have found wrong figures: see the first of them")


# ---- Processes to look at -------------------------------------------------------


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not come about")


@contextmanager
def running(command: Sequence[str | bytes], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, of which nothing is left afterwards."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else is in it
        process.communicate()


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", code, *map(str, arguments)]


@contextmanager
def ready(
    code: str, *arguments: object, command: Sequence[str] = (), **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program, or a command, that has said that it is ready."""
    with running(command or python(code, *arguments), **options) as process:
        assert process.stdout
        line = process.stdout.readline()
        if line.startswith(b"skip "):
            pytest.skip(line.decode())
        if line != b"ready\n":
            pytest.fail(f"it could not be built: {(command or code)!r}, status {process.wait(5)}")
        yield process


@contextmanager
def standing(name: str, prefix: Sequence[str] = ()) -> Iterator[int]:
    """The PID of a scene of scenes.py, once it is ready; it and its children end afterwards."""
    # As a module, of which the compiled code is kept, and without what takes more memory.
    code = "import scenes, sys; scenes.main(*sys.argv[1:])"
    command = [*prefix, *python(code, *name.split())]
    with ready("", command=command, cwd=TESTS) as process:
        yield process.pid


@pytest.fixture
def scene() -> Iterator[Callable[..., int]]:
    """Builds scenes, and gives their PIDs."""
    with contextlib.ExitStack() as stack:
        yield lambda name, prefix=(): stack.enter_context(standing(name, prefix))


@pytest.fixture(scope="module")
def forked() -> Iterator[int]:
    """A tree of four that only reading tests share."""
    with standing("forked") as pid:
        yield pid


@pytest.fixture
def ended_child() -> int:
    """The PID of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# Forks as often as told; nobody does anything more until standard input is closed.
TREE = """
import os, sys
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
os.read(0, 1)
"""


# ---- Kernel settings ------------------------------------------------------------


@contextmanager
def setting(path: str, value: str) -> Iterator[None]:
    """A kernel setting, put back whatever happens."""
    file = Path(path)
    if not file.exists():
        pytest.skip(f"this kernel has no {path}")
    before = file.read_text()
    if "[" in before:  # one of several
        before = before[before.index("[") + 1 : before.index("]")]
    try:
        file.write_text(value)
        yield
    finally:
        file.write_text(before)


@pytest.fixture
def swap() -> Iterator[None]:
    """A swap area of 256 MB for the time of a test."""
    with tempfile.NamedTemporaryFile(dir=ROOT, prefix=".swap") as file:
        os.posix_fallocate(file.fileno(), 0, 256 << 20)
        subprocess.run(["mkswap", file.name], check=True, capture_output=True)
        subprocess.run(["swapon", file.name], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", file.name], check=True)


@pytest.fixture
def hugetlb() -> Iterator[None]:
    with setting("/proc/sys/vm/nr_hugepages", "8"):
        yield


@pytest.fixture
def ksm() -> Iterator[None]:
    directory = "/sys/kernel/mm/ksm"
    with contextlib.ExitStack() as stack:
        for name, value in (("sleep_millisecs", "0"), ("pages_to_scan", "5000"), ("run", "1")):
            stack.enter_context(setting(f"{directory}/{name}", value))
        yield
    Path(directory, "run").write_text("2")  # part what was merged, then as it was
    Path(directory, "run").write_text("0")


@pytest.fixture
def thp() -> Iterator[None]:
    with setting("/sys/kernel/mm/transparent_hugepage/enabled", "madvise"):
        yield


# ---- What happens while memuse reads --------------------------------------------


def meanwhile(
    act: Callable[[int], object], stops: str, *arguments: object, **options: Any
) -> Result:
    """Run memuse, and act with its PID whenever it stops: "1 after:/proc/PID" (see Stopping)."""
    pipe, times = subprocess.PIPE, int(stops.split()[0])
    command = [*MACHINES, f"Stopping {stops}", *map(str, arguments)]
    options = {"stdout": pipe, "stderr": pipe, "env": ENVIRONMENT, **options}
    with subprocess.Popen(command, **options) as process:
        try:
            for _ in range(times):
                wait_for(lambda: state_of(process.pid) in "TZ")
                if state_of(process.pid) == "Z":
                    pytest.fail(f"it never came to {stops!r}: {process.communicate()}")
                act(process.pid)
                process.send_signal(signal.SIGCONT)
            texts = [(text or b"").decode() for text in process.communicate(timeout=60)]
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def state_of(pid: int) -> str:
    """A process's state, as /proc/PID/stat has it; X if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("latin-1")
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return stat.rpartition(")")[2].split()[0]


def kill(pid: int) -> None:
    """Until it has ended, and is at most a zombie."""
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state_of(pid) in "ZX")


def on_terminal(
    stream: str, width: int, run: Callable[..., subprocess.CompletedProcess[Any]]
) -> tuple[Any, str]:
    """What `run` gave with a terminal as its stdout or stderr, and what that shows."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    shown = b""
    with open(controller, "rb", buffering=0) as reader:
        result = run(**{stream: terminal})
        os.close(terminal)
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while piece := reader.read(1 << 16):
                shown += piece
    return result, shown.decode().replace("\r\n", "\n")
