"""The house keeps its order: imports point downwards, libraries stay in their rooms, the tree is clean.

The tables below are those of docs/architecture.md.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fisherscope"

FACE = "__init__"
ROOMS = {
    "layout": set(),
    "linalg": {"layout"},
    "adapters": {"layout"},
    "store": {"linalg", "layout"},
    "instrument": {"store", "adapters", "linalg", "layout"},
    "analyses": {"store", "linalg", "layout"},
    "apply": {"analyses", "instrument"},
    "report": {"analyses"},
    "cli": {"report", "apply", "analyses", "instrument", "store", "adapters", "linalg", "layout", "demo"},
}
# anyone may import them, and they import no room
LEAVES = {"errors", "plain", "plugins", "telling", "torch_state", "versions", "words"}
DATA = {"demo"}  # package data: for the command line and the tests

# Libraries that some rooms never see: collection and analysis run on machines that do not have them.
NEVER = {"plotly", "matplotlib", "typer"}
LAZILY = {"rich"}
QUIET_ROOMS = {"layout", "linalg", "adapters", "store", "instrument", "analyses"}


def room_of(path, package=PACKAGE):
    """The room, leaf or "__init__" that a file of the package belongs to."""
    first = path.relative_to(package).parts[0].removesuffix(".py")
    return FACE if first == "__main__" else first


def known_names(package=PACKAGE):
    """Everything directly below the package: rooms, leaves, data."""
    return {p.stem for p in package.iterdir() if p.suffix == ".py"} | {
        p.name for p in package.iterdir() if p.is_dir() and any(p.glob("*.py"))
    }


def imported_modules(tree):
    """Dotted names of what a module imports, and whether it does so on import; ``from a import b`` is a.b."""
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) in lazy


def target_room(module, names):
    """The room of an imported module of the package; None for another package's."""
    if module.startswith("."):
        return f"relative import {module}"
    first, *rest = module.split(".")
    if first != "fisherscope":
        return None
    return rest[0] if rest and rest[0] in names else FACE


def may_import(room):
    """The rooms and leaves that a room may import, itself included."""
    if room == FACE:
        return {FACE, *ROOMS, *LEAVES}
    if room in LEAVES | DATA:
        return {room, *LEAVES}
    return {room, *ROOMS[room], *LEAVES}


def upward_imports(package=PACKAGE):
    """Every import of the package that its room may not make, lazy ones and those for typing included."""
    names = known_names(package) | ROOMS.keys() | LEAVES | DATA
    found = []
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        for module, _ in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            target = target_room(module, names)
            if target is not None and target not in may_import(room):
                found.append(f"{path.relative_to(package.parent)} ({room}) imports {module} ({target})")
    return found


def foreign_imports(package=PACKAGE):
    """Imports of libraries by rooms that must work without them."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        for module, lazy in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            library = module.split(".")[0]
            quiet = room in QUIET_ROOMS and (library in NEVER or (library in LAZILY and not lazy))
            if quiet or (library == "h5py" and room != "store"):
                found.append(f"{path.relative_to(package.parent)} imports {module}")
    return found


def test_every_module_has_a_room():
    """Nothing lives outside the rooms of the design: a new top-level name needs a row in the table."""
    assert known_names() <= {FACE, "__main__", *ROOMS, *LEAVES, *DATA}
    assert {"layout", "linalg"} <= known_names()
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]


def test_the_table_itself_points_downwards():
    """Each room imports only rooms above its own line in the table: no cycles are possible."""
    seen = set()
    for room, below in ROOMS.items():
        assert below <= seen | DATA, room
        seen.add(room)


def test_imports_point_downwards():
    """No module imports a room that the table does not allow it."""
    found = upward_imports()
    assert not found, "\n".join(found)


def test_libraries_stay_in_their_rooms():
    """h5py is the store's alone; no plotting or terminal library where data is made."""
    found = foreign_imports()
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("layout", "from fisherscope.linalg import Dense"),
        ("layout", "import fisherscope.linalg.dense"),
        ("layout", "def f():\n    from fisherscope import linalg"),
        ("layout", "if TYPE_CHECKING:\n    from fisherscope.linalg import Dense"),
        ("layout", "import fisherscope"),
        ("layout", "from fisherscope import wrap"),
        ("layout", "from ..linalg import Dense"),
        ("linalg", "from fisherscope.demo import model_path"),
        ("errors", "from fisherscope.layout import Cut"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, room, line):
    """The check can fail: each way of writing an import that a room may not make."""
    package = _planted(tmp_path, room, line)
    assert len(upward_imports(package)) == 1


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("linalg", "from fisherscope.layout import Cut"),
        ("linalg", "from fisherscope import errors, layout"),
        ("linalg", "import torch"),
        ("layout", "from fisherscope.layout.slices import Cut"),
        ("layout", "from fisherscope.errors import FisherscopeError"),
    ],
)
def test_downward_imports_are_not_complained_about(tmp_path, room, line):
    """What the table allows passes."""
    assert not upward_imports(_planted(tmp_path, room, line))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import plotly.graph_objects as go", 1),
        ("def f():\n    from matplotlib import pyplot", 1),
        ("from rich import print", 1),
        ("def f():\n    import rich.progress", 0),
        ("def f():\n    import h5py", 1),
        ("import numpy", 0),
    ],
)
def test_a_planted_library_is_found(tmp_path, line, found):
    """The check of libraries can fail as well."""
    assert len(foreign_imports(_planted(tmp_path, "linalg", line))) == found


def _planted(tmp_path, room, line):
    """A package with the rooms layout, linalg, errors and demo, and one line in one of them."""
    package = tmp_path / "fisherscope"
    for name in ("layout", "linalg", "demo"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    for name in ("__init__.py", "errors.py"):
        (package / name).touch()
    target = package / room / "planted.py" if (package / room).is_dir() else package / f"{room}.py"
    target.write_text(line, encoding="utf-8")
    return package


def test_nothing_prints():
    """Results are returned and messages go through warnings and logging, never through print."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls


def test_no_machine_paths():
    """No file names a directory of the machine it was written on."""
    pattern = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|farm|opt|tmp|mnt)/\w")
    files = [
        ROOT / name for name in ("Makefile", "mkdocs.yml", "pyproject.toml", "constraints.txt", ".ci/run")
    ]
    files += ROOT.glob("*.md")
    for folder in ("fisherscope", "tests", "docs", "scripts", "benchmarks", "examples"):
        suffixes = {".py", ".md", ".json", ".toml", ".yml", ".svg", ".sh"}
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        if path.is_file()
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_importing_the_package_is_light():
    """The quiet rooms import where plotly, rich, typer and matplotlib are missing; none loads statsmodels."""
    rooms = sorted(f"fisherscope.{room}" for room in QUIET_ROOMS & known_names())
    code = f"""
import importlib, sys
for name in {sorted(NEVER | LAZILY)}:
    sys.modules[name] = None
for name in ["fisherscope", *{rooms}]:
    importlib.import_module(name)
sys.exit("import statsmodels lazily, it takes a second" if "statsmodels" in sys.modules else 0)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
