"""Each recipe of the README runs as it is pasted; nothing but PIDs and names is another's."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ENVIRONMENT, MEMUSE, ROOT, TREE, needs_root, ready, run
from test_cgroups import hierarchies, made, put

pytestmark = needs_root
README = (ROOT / "README.md").read_text()
(BLOCK,) = re.findall(r"^## Recipes\n\n```\n(.+?)^```$", README, re.M | re.S)
RECIPES = [re.sub(r"  +#.*", "", line) for line in BLOCK.splitlines()]
TOOLS = ("watch", "jq", "less", "taskset")
UNIT, CONTAINER = "nginx.service", "$(docker inspect -f '{{.Id}}' web)"


class Here(NamedTuple):
    """What the recipes are about on this machine."""

    folder: Path  # has memuse, as the installation's link does, and sudo
    pid: int
    group: str


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("bin")
    for name, line in (
        ("memuse", f'exec {shlex.join(MEMUSE)} "$@"'),
        ("sudo", 'exec env -u COLUMNS "$@"'),  # which tests have no need of: they are root's
    ):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    with ready(TREE, 3) as process, made(next(iter(hierarchies().values()), None)) as group:
        put(group, process.pid)
        yield Here(folder, process.pid, group.name)


def test_there_are_recipes_and_all_begin_with_the_installed_command() -> None:
    assert len(RECIPES) > 10
    for recipe in RECIPES:
        assert re.match(r"sudo (watch -n 5 |taskset -c 0 nice )?memuse ", recipe), recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, here: Here) -> None:
    words = shlex.split(recipe)
    for tool in TOOLS:
        if tool in words and not shutil.which(tool):
            pytest.skip(f"no {tool} here")
    line = recipe.replace(UNIT, here.group).replace(CONTAINER, here.group)
    line = re.sub(r"\$\(pgrep -o \w+\)|\$\$", str(here.pid), line)
    line = re.sub(r"\$\(pgrep -d, -x \w+\)", f"{here.pid},{here.pid}", line)
    if "watch" in words:  # on a terminal, until it has shown one
        line = f"timeout --foreground -s INT 3 script -qec {shlex.quote(line)} /dev/null </dev/null"
    path = f"{here.folder}:{ENVIRONMENT['PATH']}"
    result = run(["bash", "-c", line], env={**ENVIRONMENT, "PATH": path, "TERM": "xterm"})
    machine = " 1" in recipe or "-g /" in recipe  # on which more may be refused, or exit
    assert machine or "watch" in words or (result.returncode, result.stderr) == (0, "")
    shown = result.stdout
    if "jq" in words or "awk" in words:
        assert re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?\n", shown)
    elif "sort" in words:
        lines = shown.splitlines()
        trees = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]
        assert trees == sorted(trees, reverse=True)
        assert trees[0] > 0
        assert "TOTAL" not in shown
    else:
        assert "TOTAL" in shown
        assert machine or str(here.pid) in shown


def test_nothing_is_longer_than_a_reader_bears() -> None:
    assert README.count("\n") <= 150


def test_columns_are_those_of_the_help() -> None:
    text = run([*MEMUSE, "--help"]).stdout
    listed = re.findall(
        r"^  (\w+) +\S", text[text.index("\ncolumns") :].split("\ndefault")[0], re.M
    )
    table = re.findall(r"^\| `(\w+)` \| \S+ \|", README, re.M)
    assert table == listed
