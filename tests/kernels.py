#!/usr/bin/env python3
"""Run the scenes on other kernels and architectures, in QEMU, against the slow reference.

    tests/kernels.py --list             what can be run, and its suite and kernel package
    tests/kernels.py s390x-bookworm     one, or several, by name
    tests/kernels.py                    all: an hour or more where nothing is accelerated

Kernels and user spaces are packages of Debian, fetched with apt from the mirror that this
machine uses, and verified by it.  They are unpacked, not installed: no root, and no emulation
of programs, is needed.  Each becomes an image in the cache folder ($XDG_CACHE_HOME or ~/.cache,
memuse-kernels), which is kept until --refresh.  A guest has no network; the project reaches
it in its initramfs, and what it says on its serial console is kept beside the images.

Exit status: 0 all exact; 1 a scene was wrong or a guest did not finish; 3 all that could be
run was exact, but something was missing, and named.
"""

from __future__ import annotations

import argparse
import json
import lzma
import mmap
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Missing(Exception):
    """What cannot be had here, in one line."""


class Emulated(NamedTuple):
    """How to emulate an architecture; both names go on after qemu-system-."""

    emulator: str
    package: str
    options: str
    console: str


class Guest(NamedTuple):
    """A kernel package, and what to run it on."""

    name: str
    architecture: str  # as Debian calls it
    suites: str  # the first one's user space
    package: str
    options: str = ""


# edd=off: else the kernel asks an emulated BIOS for disks, for many seconds.
# pauth-impdef: the architected algorithm takes half of the time under emulation.
# cap-hpt-max-page-size: else there are no huge pages with hashed page tables.
X86 = Emulated("x86_64", "x86", "-M q35 -cpu max", "ttyS0 edd=off")
ARM = Emulated("aarch64", "arm", "-M virt -cpu max,pauth-impdef=on", "ttyAMA0")
S390 = Emulated("s390x", "s390x", "-M s390-ccw-virtio -cpu max", "ttysclp0")
PPC = Emulated("ppc64", "ppc", "-M pseries,cap-hpt-max-page-size=16m", "hvc0")
MACHINES = {"amd64": X86, "arm64": ARM, "s390x": S390, "ppc64el": PPC}
PPC64LE = "linux-image-powerpc64le"
NEWER = "bookworm-backports"
POWER8, POWER9 = "-cpu power8", "-cpu power9"  # hashed page tables, and radix
KERNELS = [
    Guest("amd64-bullseye", "amd64", "bullseye", "linux-image-amd64"),
    Guest("amd64-bookworm", "amd64", "bookworm", "linux-image-amd64"),
    Guest("amd64-trixie", "amd64", "trixie", "linux-image-amd64"),
    Guest("amd64-sid", "amd64", "sid", "linux-image-amd64"),
    Guest("amd64-experimental", "amd64", "sid experimental", "linux-image-amd64/experimental"),
    Guest("arm64-bookworm", "arm64", "bookworm", "linux-image-arm64"),
    Guest("arm64-16k-trixie", "arm64", "trixie", "linux-image-arm64-16k"),
    Guest("arm64-16k-sid", "arm64", "sid", "linux-image-arm64-16k"),
    Guest("s390x-bookworm", "s390x", "bookworm", "linux-image-s390x"),
    Guest("s390x-sid", "s390x", "sid", "linux-image-s390x"),
    Guest("ppc64el-hash-bookworm", "ppc64el", "bookworm", PPC64LE, POWER8),
    Guest("ppc64el-radix-bookworm", "ppc64el", "bookworm", PPC64LE, POWER9),
    Guest(
        "ppc64el-radix-backports", "ppc64el", f"bookworm {NEWER}", f"{PPC64LE}-64k/{NEWER}", POWER9
    ),
    Guest("ppc64el-radix-sid", "ppc64el", "sid", f"{PPC64LE}-64k", POWER9),
    Guest("ppc64el-radix-4k-trixie", "ppc64el", "trixie", PPC64LE, POWER9),
]

# ---- Packages -------------------------------------------------------------------

# Nothing is essential to apt where nothing is installed: all that scenes and init run is named.
USERLAND = "python3 python3-psutil procps util-linux mount coreutils libc-bin busybox-static"
MODULES = "virtio_pci virtio_blk crc32c_generic ext4"  # a kernel may have them built in
IMAGES = "boot/vmlinu[xz]-*", "usr/lib/modules/*/vmlinu[xz]"  # the second: Debian's Linux 7
LEFT_OUT = ["./usr/share/doc/*", "./usr/share/man/*", "./usr/share/locale/*"]


def run(*command: str | Path) -> str:
    """What a command prints; its error is why something is missing."""
    words = [str(word) for word in command]
    null = subprocess.DEVNULL
    result = subprocess.run(words, stdin=null, capture_output=True, text=True, timeout=900)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        why = [line for line in lines if line.startswith("E:")] or lines[-1:]
        raise Missing(f"{words[0]}: {why[0]}")
    return result.stdout


def mirror() -> str:
    """Where this machine's apt has Debian from."""
    sites = run(
        "apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Label: Debian"
    ).split()
    if not sites:
        raise SystemExit("kernels: apt knows no mirror of Debian; run: apt-get update")
    return sites[0]


class Apt:
    """An apt of its own for suites and an architecture, to which nothing is installed yet."""

    def __init__(self, folder: Path, kernel: Guest) -> None:
        self.archives = folder / "archives"
        state = folder / "apt" / f"{kernel.suites.replace(' ', '-')}-{kernel.architecture}"
        for path in (self.archives / "partial", state / "lists/partial"):
            path.mkdir(parents=True, exist_ok=True)
        sources, status = state / "sources.list", state / "status"
        options = f"[signed-by={KEYRING}] {mirror()}"
        sources.write_text("".join(f"deb {options} {s} main\n" for s in kernel.suites.split()))
        status.touch()
        settings = {
            "APT::Architecture": kernel.architecture,
            "APT::Architectures::": kernel.architecture,
            "APT::Default-Release": kernel.suites.split()[0],
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",  # the cache may be private
            "Dir::Cache": state,
            "Dir::Cache::archives": self.archives,
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": state,
            "Dir::State::status": status,
        }
        self.options = [f"-o{name}={value}" for name, value in settings.items()]

    def get(self, *arguments: str) -> str:
        return run("apt-get", "-qy", *self.options, *arguments)

    def fetch(self, packages: list[str]) -> list[Path]:
        """The files of packages, and of all that they need."""
        self.get("update", "--error-on=any")
        install = ["install", "--no-install-recommends", *packages]
        listing = self.get("--simulate", *install)
        self.get("--download-only", *install)
        found = re.findall(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", listing, re.MULTILINE)
        names = ("_".join((name, ver.replace(":", "%3a"), arch)) for name, ver, arch in found)
        return [self.archives / f"{name}.deb" for name in names]


def unpack(packages: list[Path], tree: Path) -> None:
    """A root file system of packages, none of which is configured."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", "etc"):
        (tree / name).mkdir()
    extract = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(tree)]
    extract += [f"--exclude={pattern}" for pattern in LEFT_OUT]
    for package in packages:
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:
            subprocess.run(extract, stdin=archive.stdout, check=True)
        if archive.returncode:
            raise Missing(f"dpkg-deb cannot read {package}")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")


# ---- Images ---------------------------------------------------------------------

INIT = """#!/payload/busybox sh
b=/payload/busybox
$b mount -t devtmpfs dev /dev
for module in /modules/*; do $b insmod $module; done
$b mkdir /new
for second in 1 2 3 4 5 6 7 8 9 10; do
    $b mount -t ext4 /dev/vda /new && break
    $b sleep 1
done
$b cp -r /payload /new/
$b mount -o move /dev /new/dev
$b mkdir -p /new/dev/shm /new/var/tmp
$b mount -t tmpfs shm /new/dev/shm
$b mount -t proc proc /new/proc
$b mount -t sysfs sys /new/sys
export PATH=/usr/sbin:/usr/bin LANG=C.UTF-8 HOME=/
exec $b switch_root /new $b sh -c "python3 /payload/tests/kernels.py --inside; $b poweroff -f"
"""


def load(path: Path) -> bytes:
    """A module's contents."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise Missing(f"modules are compressed as {path.suffix}")
    return data


def modules(tree: Path) -> list[bytes]:
    """The modules for the root file system, each after those that it needs."""
    paths = {  # by name, as mbcache of mbcache.ko.xz
        path.name.partition(".")[0].replace("-", "_"): path
        for path in tree.glob("usr/lib/modules/*/kernel/**/*.ko*")
    }
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in paths and name not in found:
            data = load(paths.pop(name))
            depends = re.search(rb"\0depends=([^\0]*)", data)
            for other in depends[1].decode().split(",") if depends else ():
                add(other)
            found[name] = data

    for name in MODULES.split():
        add(name)
    return list(found.values())


def cpio(files: dict[str, bytes]) -> bytes:
    """An initramfs of files, in folders that come before them."""
    folders = {str(folder) for name in files for folder in Path(name).parents} - {"."}
    entries = [(name, 0o40755, b"") for name in sorted(folders)]
    entries += [(name, 0o100755, data) for name, data in files.items()]
    archive = b""
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")]):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (name.encode() + b"\0", data):
            archive += part
            archive += bytes(-len(archive) % 4)
    return archive


def only(tree: Path, *patterns: str) -> Path:
    paths = [path for pattern in patterns for path in tree.glob(pattern)]
    if len(paths) != 1:
        raise Missing(f"{len(paths)} files, not one, are {' or '.join(patterns)}")
    return paths[0]


def image(cache: Path, kernel: Guest, refresh: bool) -> Path:
    """A folder with a kernel, what its initramfs needs, and a root file system."""
    name = f"{kernel.package} {kernel.suites}".replace("/", " ").replace(" ", "-")
    made = cache / name
    if made.exists() and not refresh:
        return made
    packages = Apt(cache, kernel).fetch([*USERLAND.split(), kernel.package])
    with tempfile.TemporaryDirectory(dir=cache, prefix="new-") as folder:
        new, tree = Path(folder, "image"), Path(folder, "tree")
        (new / "modules").mkdir(parents=True)
        unpack(packages, tree)
        shutil.copy(only(tree, *IMAGES), new / "kernel")
        shutil.copy(only(tree, "usr/bin/busybox"), new / "busybox")
        for number, data in enumerate(modules(tree)):
            (new / f"modules/{number:02}").write_bytes(data)
        for path in (tree / "boot", tree / "usr/lib/modules"):
            shutil.rmtree(path, ignore_errors=True)
        run("mke2fs", "-q", "-t", "ext4", "-d", tree, new / "root.ext4", "2G")
        shutil.rmtree(made, ignore_errors=True)
        new.rename(made)
    return made


def initramfs(made: Path) -> bytes:
    """With the project as it is now."""
    files = {"init": INIT.encode(), "payload/busybox": (made / "busybox").read_bytes()}
    for path in sorted((made / "modules").iterdir()):
        files[f"modules/{path.name}"] = path.read_bytes()
    for path in [ROOT / "memuse.py", *(ROOT / "tests").glob("*.py")]:
        files[f"payload/{path.relative_to(ROOT)}"] = path.read_bytes()
    return cpio(files)


# ---- Runs -----------------------------------------------------------------------


def accelerators(architecture: str) -> list[str]:
    """What to try in turn: KVM may be there and not work, as in many virtual machines."""
    native = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    kvm = native == architecture and os.access("/dev/kvm", os.R_OK | os.W_OK)
    return ["kvm", "tcg,thread=single"] if kvm else ["tcg,thread=single"]


def boot(made: Path, kernel: Guest, log: Path, seconds: int) -> dict[str, Any] | None:
    """What the guest found, if it finished."""
    machine = MACHINES[kernel.architecture]
    command = [f"qemu-system-{machine.emulator}", *machine.options.split(), *kernel.options.split()]
    command += ["-smp", "1", "-m", "4G", "-nographic", "-nic", "none", "-no-reboot"]
    command += ["-drive", f"file={made / 'root.ext4'},format=raw,if=virtio,snapshot=on"]
    command += ["-append", f"console={machine.console} loglevel=4 panic=-1"]
    command += ["-kernel", str(made / "kernel")]
    with tempfile.NamedTemporaryFile() as file:
        file.write(initramfs(made))
        file.flush()
        command += ["-initrd", file.name]
        for accelerator in accelerators(kernel.architecture):
            with log.open("wb") as console, suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*command, "-accel", accelerator],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    timeout=seconds,
                )
            said = log.read_text(errors="replace")
            result = re.search(r"^result (\{.*\})", said, re.MULTILINE)
            if result:
                found: dict[str, Any] = json.loads(result[1])
                return found
    return None


COLUMNS = "{:<24} {:<28} {:<8} {:>6} {:>6} {:<8} {:>6} {:>7}"
HEADINGS = "NAME", "KERNEL", "MACHINE", "PAGE", "HUGE", "PYTHON", "EXACT", "SECONDS"


def report(name: str, found: dict[str, Any], seconds: float) -> None:
    exact, wrong, not_made = (found["scenes"][kind] for kind in ("exact", "wrong", "not made"))
    right = f"{len(exact)}/{len(exact) + len(wrong)}"
    figures = (found[key] for key in ("kernel", "machine", "page", "huge", "python"))
    print(COLUMNS.format(name, *figures, right, int(seconds)), flush=True)
    for kind, names in (("wrong", wrong), ("not made here", not_made)):
        if names:
            print(f"    {kind}: {', '.join(names)}", flush=True)


def outside(cache: Path, kernels: list[Guest], refresh: bool, seconds: int) -> int:
    status, missing = 0, []
    cache.mkdir(parents=True, exist_ok=True)
    print(COLUMNS.format(*HEADINGS), flush=True)
    for kernel in kernels:
        try:
            made = image(cache, kernel, refresh)
        except (Missing, OSError, subprocess.SubprocessError) as error:
            missing.append(f"{kernel.name}: {error}")
            continue
        start = time.monotonic()
        log = cache / f"{kernel.name}.log"
        found = boot(made, kernel, log, seconds)
        if not found:
            print(f"{kernel.name:<24} did not finish; see {log}", flush=True)
            status = 1
            continue
        report(kernel.name, found, time.monotonic() - start)
        if found["scenes"]["wrong"] or not found["scenes"]["exact"]:
            status = 1
    for line in missing:
        print(f"missing: {line}")
    return status or (3 if missing else 0)


def need_commands(kernels: list[Guest]) -> None:
    """One error for all that is not installed."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # mke2fs
    packages = {"apt-get": "apt", "dpkg-deb": "dpkg", "tar": "tar", "mke2fs": "e2fsprogs"}
    for machine in {MACHINES[kernel.architecture] for kernel in kernels}:
        packages[f"qemu-system-{machine.emulator}"] = f"qemu-system-{machine.package}"
    missing = [packages[name] for name in packages if not shutil.which(name)]
    if not Path(KEYRING).exists():
        missing.append("debian-archive-keyring")
    if missing:
        raise SystemExit(f"kernels: packages are missing; run: apt-get install {' '.join(missing)}")


# ---- In the guest ---------------------------------------------------------------

SCENES = (
    "plain lopsided forked generations crowd zero file_twice misnamed shared windows scattered"
    " moved guarded mappings sparse vforked lone_thread zombie huge_zero hugetlb swapped ksm"
    " cousins backends twins twin_siblings twins_huge tmpfs_huge swapped_branches"
    " shared_filled memfd_windows memfd_strewn memfd_open memfd_open_above memfd_private"
    " memfd_of_sisters memfd_of_twins memfd_of_thread memfd_huge memfd_swapped sysv_removed"
    " sysv_kept sysv_elsewhere tmpfs_files disk_files mounted mounted_elsewhere"
    " emptied_moved emptied_branches emptied_twins emptied_swapped"
)
HUGE_SCENES = "huge huge_misplaced homeless vforked_huge emptied"
CHANCE = [f"anything {seed}" for seed in (3, 7, 23)]
READY_SECONDS, COUNT_SECONDS = 120, 240
MM = "/sys/kernel/mm"
SETTINGS = {
    f"{MM}/transparent_hugepage/enabled": "madvise",
    "/proc/sys/vm/nr_hugepages": "8",
    "/proc/sys/vm/overcommit_memory": "1",  # scenes reserve more than a guest has
    f"{MM}/ksm/run": "1",
}


def prepare() -> None:
    """Turn on what scenes need; those for which it fails are then not made, and named."""
    for path, value in SETTINGS.items():
        with suppress(OSError):
            Path(path).write_text(value)
    with suppress(OSError), open("/swap", "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        os.posix_fallocate(file.fileno(), 0, 10240 * mmap.PAGESIZE)
        for command in ("mkswap", "swapon"):
            subprocess.run([command, "/swap"], stdout=subprocess.DEVNULL)


@contextmanager
def scene(name: str) -> Iterator[int]:
    """The PID of a scene that stands still; or Missing."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/scenes.py"), *name.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        try:
            until, ready = time.monotonic() + READY_SECONDS, False
            # A child of a scene that died may keep the pipe open: do not wait for its end.
            while not ready and process.poll() is None and time.monotonic() < until:
                ready = bool(select.select([process.stdout], [], [], 1)[0])
            if not ready or process.stdout.readline() != b"ready\n":
                errors.seek(0)
                why = f"not ready, exit status {process.poll()}"
                raise Missing((errors.read().splitlines() or [why])[-1])
            yield process.pid
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else is in it
            process.wait()
            process.stdin.close()
            process.stdout.close()


def compare(pid: int) -> list[str]:
    """How memuse's report on a tree differs from the reference."""
    import reference

    command = [sys.executable, str(ROOT / "memuse.py"), "--json", str(pid)]
    pids = reference.tree(pid)
    expected = reference.count(pids)
    found: list[str] = []
    for _ in range(5):
        result = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_SECONDS)
        if result.returncode or result.stderr:
            return [f"exit status {result.returncode}", *result.stderr.splitlines()[-3:]]
        found = reference.differences(json.loads(result.stdout), expected)
        before, expected = expected, reference.count(pids) if found else {}
        if not found or before == expected:
            break  # else the kernel collapsed or reclaimed pages meanwhile
    return found


def has_huge_pages(pid: int) -> bool:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return not re.search(r"^AnonHugePages: +0 ", rollup, re.MULTILINE)


def inside() -> None:
    """Compare all scenes; the last line is the result for outside()."""
    prepare()
    scenes: dict[str, list[str]] = {"exact": [], "wrong": [], "not made": []}
    for name in [*SCENES.split(), *HUGE_SCENES.split(), *CHANCE]:
        start = time.monotonic()
        try:
            with scene(name) as pid:
                if name in HUGE_SCENES.split() and not has_huge_pages(pid):
                    raise Missing("it has no huge page")
                found = compare(pid)
            kind = "wrong" if found else "exact"
        except Missing as error:
            kind, found = "not made", [str(error)]
        except Exception as error:  # of one scene: the others are still to be seen
            kind, found = "wrong", [repr(error)]
        scenes[kind].append(name)
        print(f"scene {name}: {kind}, {time.monotonic() - start:.1f} s", flush=True)
        print("".join(f"    {line}\n" for line in found[:12]), end="", flush=True)
    huge = Path(f"{MM}/transparent_hugepage/hpage_pmd_size")
    result = {
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "page": mmap.PAGESIZE,
        "huge": huge.read_text().strip() if huge.exists() else "-",
        "python": platform.python_version(),
        "scenes": scenes,
    }
    print(f"result {json.dumps(result)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the scenes on other kernels, in QEMU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels of --list; or all")
    parser.add_argument("--list", action="store_true", help="list what can be run")
    parser.add_argument("--refresh", action="store_true", help="make images anew")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds for a guest (1500)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        if str(ROOT) != "/payload":
            parser.error("--inside is for guests: it changes settings of the kernel")
        inside()
        return 0
    if arguments.list:
        for kernel in KERNELS:
            words = kernel.package, kernel.options
            print(f"{kernel.name:<24} {kernel.suites:<18}", *filter(None, words))
        return 0
    unknown = set(arguments.names) - {kernel.name for kernel in KERNELS}
    if unknown:
        parser.error(f"not in --list: {', '.join(sorted(unknown))}")
    kernels = [k for k in KERNELS if not arguments.names or k.name in arguments.names]
    need_commands(kernels)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the guest
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(folder, "memuse-kernels").absolute()
    return outside(cache, kernels, arguments.refresh, arguments.timeout)


if __name__ == "__main__":
    raise SystemExit(main())
