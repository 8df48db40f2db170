"""The rules of the code: imports run downward, libraries have homes, starting is quick."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import batchgen
from tests.house import FLOOR, HOMES, PAGE, page

PACKAGE = Path(batchgen.__file__).parent
ANYWHERE_ABOVE_ERRORS = ("numpy", "pyarrow")
HEAVY = ("torch", "ray", "diffusers", "transformers", "pyarrow", "pydantic", "numpy", "fsspec")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
HELP_CPU_S = 0.5
MOST_ROOMS, MOST_FLOORS = 29, 10
MODELS = ("pipeline", "refiner", "vae", "vqvae", "unet", "transformer", "encoder", "text_encoder")


@dataclass(frozen=True)
class Import:
    """``target`` is a module of batchgen's first level, or a foreign library."""

    target: str
    own: bool
    for_types: bool


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def module_of(path: Path) -> str:
    """``batchgen/models/load.py`` belongs to ``models``."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return {"__init__": "batchgen", "__main__": "cli"}.get(name, name)


def imports_of(tree: ast.Module) -> Iterator[Import]:
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [str(node.module)]
            if node.module == "batchgen":
                names = [f"batchgen.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            own = root == "batchgen"
            inner = rest.partition(".")[0]
            target = (inner if inner in FLOOR else "batchgen") if own else root
            yield Import(target, own, id(node) in typed)


@cache
def imports() -> dict[str, frozenset[Import]]:
    """Module -> what its files import, wherever in the file."""
    found: dict[str, set[Import]] = {}
    for path, tree in sources().items():
        found.setdefault(module_of(path), set()).update(imports_of(tree))
    return {module: frozenset(each) for module, each in found.items()}


@cache
def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (path, node)
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_the_house_is_read_whole() -> None:
    assert {"cli", "runner", "plan", "engine", "models", "records"} <= imports().keys()
    assert Import("ray", False, False) in imports()["engine"]
    assert Import("torch", False, True) in imports()["records"]
    assert Import("engine", True, False) in imports()["runner"]


def test_every_module_has_its_floor() -> None:
    assert imports().keys() == FLOOR.keys()
    assert len(FLOOR) <= MOST_ROOMS and max(FLOOR.values()) <= MOST_FLOORS


def test_the_page_about_the_code_is_that_of_the_code() -> None:
    assert PAGE.read_text() == page(), "python -m tests.house > docs/code.md"


def test_imports_run_downward() -> None:
    upward = [
        f"{module} imports {one.target}"
        for module, found in imports().items()
        for one in found
        if one.own and one.target != module and FLOOR[one.target] >= FLOOR[module]
    ]
    assert upward == []


def test_no_floor_is_higher_than_it_need_be() -> None:
    """The listed floors are the lowest that the imports allow."""
    for module, found in imports().items():
        below = [FLOOR[one.target] for one in found if one.own and one.target != module]
        assert FLOOR[module] == 1 + max(below, default=0), module


def test_no_imports_in_a_circle() -> None:
    below = {
        module: {one.target for one in found if one.own and not one.for_types} - {module}
        for module, found in imports().items()
    }
    while ends := {module for module in below if not below[module] & below.keys()}:
        below = {module: targets for module, targets in below.items() if module not in ends}
    assert below == {}


def test_the_stages_know_no_ray_no_storage_and_no_loading() -> None:
    targets = {one.target for one in imports()["stages"]}
    assert not targets & {"ray", "fsspec", "storage", "models", "diffusers", "spec"}
    assert not targets & {"transformers", "plan", "input", "output"}


def test_families_and_stages_ask_in_one_way_where_models_run() -> None:
    """The ``device`` of a model or a pipeline is that of its weights, which may be elsewhere."""
    found = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for path, tree in sources().items()
        if module_of(path) in ("families", "stages")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("device", "_execution_device")
        and ast.unparse(node.value).rpartition(".")[2] in MODELS
    ]
    assert [one.partition(" ")[2] for one in found] == ["pipeline._execution_device"], found


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_loaded_at_home_alone(library: str) -> None:
    users = {
        module
        for module, found in imports().items()
        for one in found
        if one.target == library and not one.own and not one.for_types
    }
    assert users <= set(HOMES[library])


def test_no_library_without_a_home() -> None:
    known = {*HOMES, *ANYWHERE_ABOVE_ERRORS, *sys.stdlib_module_names}
    foreign = {one.target for found in imports().values() for one in found if not one.own}
    assert foreign <= known


@cache
def names_of(module: str) -> set[str]:
    """What a module of batchgen has at its top, without loading it; of a package, modules too."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not path.is_file():
        return set()
    symbols = symtable.symtable(path.read_text(), str(path), "exec").get_symbols()
    found = {one.get_name() for one in symbols if one.is_assigned() or one.is_imported()}
    return found | ({one.stem for one in place.iterdir()} if place.is_dir() else set())


@pytest.mark.parametrize("folder", ["jobs", "benchmarks", "tests"])
def test_what_others_import_of_batchgen_exists(folder: str) -> None:
    missing, seen = [], 0
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and node.module):
                continue
            if node.module.split(".")[0] == "batchgen":
                seen += 1
                wanted = {one.name for one in node.names} - names_of(node.module)
                missing += [f"{path}: {name} of {node.module}" for name in wanted]
    assert seen
    assert missing == []


def test_nothing_is_pickled_or_loaded_by_name() -> None:
    targets = {one.target for found in imports().values() for one in found}
    assert not targets & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    text = "\n".join(path.read_text() for path in sources())
    # One file of a package, of a known SHA-256, without the code that a pickle may hold.
    text = text.replace("torch.load(io.BytesIO(data), weights_only=True)", "", 1)
    for word in ("import_module(", "__import__(", "torch.load(", "trust_remote_code=True"):
        assert word not in text


def test_every_file_says_what_it_is_and_is_not_long() -> None:
    for path, tree in sources().items():
        assert ast.get_docstring(tree), f"{path} has no docstring"
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines"


def test_functions_are_short_and_typed() -> None:
    for path, function in functions():
        where = f"{path.name}: {function.name}"
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{where} has {length} lines"
        assert function.returns is not None, f"{where} has no return type"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [one.arg for one in arguments if one.annotation is None]
        assert set(untyped) <= {"self", "cls"}, f"{where} has untyped {untyped}"


def test_most_functions_are_under_ten_lines() -> None:
    lengths = sorted(
        (function.end_lineno or 0) - function.body[0].lineno + 1 for _, function in functions()
    )
    assert lengths[len(lengths) // 2] < 10


def test_module_names_are_words_of_the_stream() -> None:
    vague = {"utils", "util", "core", "base", "common", "helpers", "helper", "misc", "manager"}
    assert not {path.stem for path in sources()} & vague


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a clean interpreter after some code."""
    ask = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(run.stdout.splitlines()[-1])
    return {name.partition(".")[0] for name in names}


def test_import_batchgen_loads_nothing_heavy() -> None:
    loaded = loaded_after("import batchgen")
    assert "batchgen" in loaded
    assert not loaded & {*HOMES, *ANYWHERE_ABOVE_ERRORS}


def test_the_runner_loads_no_torch_ray_or_diffusers() -> None:
    loaded = loaded_after("import batchgen.runner, batchgen.shard.stages, batchgen.output.verify")
    assert {"pyarrow", "pydantic"} <= loaded
    assert not loaded & {"torch", "ray", "diffusers", "transformers", "datasets", "rich"}


def test_readers_and_the_driver_load_no_torch() -> None:
    loaded = loaded_after("import batchgen.engine.stream")
    assert "ray" in loaded
    assert not loaded & {"torch", "diffusers", "transformers"}


HELP = """
import sys
from batchgen.cli import main
sys.argv = ["batchgen", {arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("arguments", ["'--help'", "'run', '--help'", "'--version'"])
def test_help_loads_nothing_heavy(arguments: str) -> None:
    loaded = loaded_after(HELP.format(arguments=arguments))
    assert "click" in loaded
    assert not loaded & set(HEAVY)


def test_help_is_quick() -> None:
    command = [sys.executable, "-c", HELP.format(arguments="'--help'")]
    best_s = min(cpu_seconds(command) for _ in range(3))
    assert best_s < HELP_CPU_S


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a child process, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Commands:" in run.stdout
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
