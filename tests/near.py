"""Lists the test files that a change can reach; `make near` runs them.

A test file reaches what it imports, directly or through other modules, and what the strings in it
name (`python -m batchgen` in a new process, a page of docs). Changed is what differs from the last
commit that is on ``main`` too, committed or not.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import deque
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOOKED_AT = ("unit", "model", "ray")
OURS = re.compile(r"\b(?:batchgen|tests|jobs)(?:\.\w+)*\b")
COMMANDS = "batchgen.cli"  # its modules add their commands to it; no name leads to them
FAR = 1_000
EVERYWHERE = {"tests/conftest.py", "pyproject.toml", "constraints.txt"}


def changed() -> set[str]:
    """Paths from the root, of files that exist no more too."""
    known = subprocess.run(["git", "rev-parse", "-q", "--verify", "main"], cwd=ROOT).returncode == 0
    base = git("merge-base", "HEAD", "main")[0] if known else "HEAD"
    untracked = git("ls-files", "--others", "--exclude-standard")
    return {*git("diff", "--name-only", "--no-renames", base), *untracked}


def git(*words: str) -> list[str]:
    run = ["git", *words]
    return subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


@cache
def named(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Dotted names of our modules in a file, wherever they are, and its strings."""
    modules, strings = set[str](), set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {COMMANDS} & {str(node.module)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
            modules |= {COMMANDS} if node.value == "batchgen" else set(OURS.findall(node.value))
    return frozenset(modules), frozenset(strings)


@cache
def file_of(module: str) -> Path | None:
    """Where an import of a dotted name leads: a package's face passes names on to their files."""
    place = ROOT.joinpath(*module.split("."))
    if place.with_suffix(".py").exists():
        return place.with_suffix(".py")
    if (place / "__init__.py").exists():
        return place / "__init__.py"
    parent, _, name = module.rpartition(".")
    above = file_of(parent) if parent else None
    if above and above.name == "__init__.py":
        passed = passed_on(above).get(name, module)
        return file_of(passed) if passed != module else above
    return above


@cache
def passed_on(face: Path) -> dict[str, str]:
    """Name -> the dotted name that a package's face imports under it."""
    imports = [one for one in ast.parse(face.read_text()).body if isinstance(one, ast.ImportFrom)]
    return {
        alias.asname or alias.name: f"{one.module}.{alias.name}"
        for one in imports
        for alias in one.names
    }


@cache
def reached(test: Path) -> tuple[dict[Path, int], set[str]]:
    """File -> imports from the tests to it; and all strings in the files of the tests."""
    steps, strings, ahead = dict[Path, int](), set[str](), deque([(test, 0)])
    while ahead:
        path, step = ahead.popleft()
        if path in steps:
            continue
        steps[path] = step
        modules, found = named(path)
        strings |= found if path.is_relative_to(ROOT / "tests") else set()
        for file in {file for module in modules if (file := file_of(module))}:
            inside = file.is_relative_to(ROOT / "tests")
            (ahead.appendleft if inside else ahead.append)((file, step + (not inside)))
    return steps, strings


def near(paths: set[str], most: int) -> list[str]:
    """The test files that lead to one of the paths by ``most`` imports, nearest first."""
    tests = [one for tier in LOOKED_AT for one in sorted((ROOT / "tests" / tier).glob("test_*.py"))]
    found = {test: 0 if paths & EVERYWHERE else distance(test, paths) for test in tests}
    chosen = [test for test in sorted(tests, key=found.__getitem__) if found[test] <= most]
    return [str(test.relative_to(ROOT)) for test in chosen]


def distance(test: Path, paths: set[str]) -> int:
    steps, strings = reached(test)
    others = {part for path in paths if not path.endswith(".py") for part in Path(path).parts}
    if strings & others:
        return 0
    return min((steps[ROOT / path] for path in paths if ROOT / path in steps), default=FAR)


if __name__ == "__main__":
    chosen = near(changed(), int(sys.argv[1]))
    print(f"{len(chosen)} test files can be reached by what changed:", *chosen, file=sys.stderr)
    print(*chosen)
