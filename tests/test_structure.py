"""The house rules as a test: who may import whom, where device libraries live, sizes, and the READMEs' file tree.

docs/structure.md explains the rooms; FLOORS below is the same list in a form that a machine checks.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import readme_tree

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "surefoot"

# From the ground up. A room imports from floors below its own and from itself, never from a neighbour.
FLOORS = [
    {"core"},
    {"device", "canaries"},
    {"weights"},
    {"ops"},
    {"cache", "quant"},
    {"layers"},
    {"models"},
    {"engine"},
    {"backends"},
    {"run", "serve"},
    {"verify", "bench", "analyze", "report"},
    {"bringup", "compare"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# (file, room): an upward import for type checkers only, which never runs.
TYPES_ONLY: set[tuple[str, str]] = set()

DEVICE_LIBRARY = re.compile(r"torch\.cuda|torch\.npu|torch_npu|\.cuda\(|\.npu\(")
DEVICE_ROOMS = ("surefoot/device/", "surefoot/ops/cuda/", "surefoot/ops/npu/")

# One device-to-host copy per step, in engine/runner.py.
HOST_COPY = {"item", "tolist", "cpu"}
HOST_COPY_FREE = ("surefoot/engine/", "surefoot/layers/", "surefoot/models/")
HOST_COPY_ALLOWED = {"surefoot/engine/runner.py": None, "surefoot/engine/sampler.py": "unpack"}  # unpack reads numpy

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FILES: dict[str, str] = {}  # file: why
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}  # (file, function): why

TORCH_FREE = [
    "surefoot",
    "surefoot.core.config",
    "surefoot.core.errors",
    "surefoot.core.outputs",
    "surefoot.core.request",
    "surefoot.core.sampling",
    "surefoot.canaries",
    "surefoot.device",
    "surefoot.device.chips",
    "surefoot.cache.pages",
    "surefoot.cache.plan",
    "surefoot.cache.states",
    "surefoot.engine.outputs",
    "surefoot.engine.scheduler",
    "surefoot.run.ask",
    "surefoot.run.batch",
    "surefoot.run.chat",
    "surefoot.serve.settings",
    "surefoot.cli.main",
]


def python_files(*folders: str) -> list[Path]:
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def types_only_lines(tree: ast.Module) -> set[int]:
    """Lines inside `if TYPE_CHECKING:`."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.body:
                lines |= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def imports(path: Path, tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too; `from a import b` gives a.b."""
    found = []
    package = name_of(path).removesuffix(".py").removesuffix("/__init__").split("/")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                keep = len(package) - node.level + (path.name == "__init__.py")
                base = ".".join([*package[:keep], *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "surefoot" and (PACKAGE / parts[1]).is_dir() else None


def test_every_room_has_a_floor():
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(FLOOR_OF), f"give these rooms a floor here and in docs/structure.md: {rooms - set(FLOOR_OF)}"


def test_a_room_imports_only_from_below():
    wrong = []
    for path in python_files("surefoot"):
        here = name_of(path).split("/")[1]
        if here not in FLOOR_OF:
            continue  # surefoot/__init__.py
        tree = parsed(path)
        exempt = types_only_lines(tree)
        for line, dotted in imports(path, tree):
            room = room_of(dotted)
            if room in (None, here) or FLOOR_OF[room] < FLOOR_OF[here]:
                continue
            if not (line in exempt and (name_of(path), room) in TYPES_ONLY):
                wrong.append(f"{name_of(path)}:{line} imports {dotted}")
    assert not wrong, "\n".join(wrong)


def test_nothing_in_the_package_imports_tests_or_tools():
    roots = {"tests", "tools", "benchmarks"}
    wrong = [
        f"{name_of(path)}:{line} imports {dotted}"
        for path in python_files("surefoot")
        for line, dotted in imports(path, parsed(path))
        if dotted.split(".")[0] in roots
    ]
    assert not wrong, "\n".join(wrong)


def code_only(path: Path) -> str:
    """The source without comments and docstrings: what runs."""
    return ast.unparse(DropDocstrings().visit(parsed(path)))


class DropDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_text else self.generic_visit(node)


def test_device_libraries_appear_only_behind_the_seam():
    wrong = [
        f"{name_of(path)}: {match.group()}"
        for path in python_files("surefoot")
        if not name_of(path).startswith(DEVICE_ROOMS)
        for match in DEVICE_LIBRARY.finditer(code_only(path))
    ]
    assert not wrong, "ask the Device instead: " + "; ".join(wrong)


def function_lines(tree: ast.Module, name: str | None) -> set[int]:
    """Lines of the function of that name."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    return {line for f in functions for line in range(f.lineno, (f.end_lineno or f.lineno) + 1)}


def test_one_copy_to_the_host_per_step():
    wrong = []
    for path in python_files("surefoot"):
        if not name_of(path).startswith(HOST_COPY_FREE) or HOST_COPY_ALLOWED.get(name_of(path), "") is None:
            continue
        tree = parsed(path)
        exempt = function_lines(tree, HOST_COPY_ALLOWED.get(name_of(path)))
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr in HOST_COPY and node.lineno not in exempt:
                wrong.append(f"{name_of(path)}:{node.lineno} calls .{node.func.attr}()")
    assert not wrong, "\n".join(wrong)


def test_small_files_and_short_functions():
    wrong = []
    for path in python_files("surefoot", "tools", "benchmarks"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES and name_of(path) not in LONG_FILES:
            wrong.append(f"{name_of(path)} has {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES and (name_of(path), node.name) not in LONG_FUNCTIONS:
                    wrong.append(
                        f"{name_of(path)}:{node.lineno} {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
                    )
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is():
    wrong = [
        name_of(p) for p in python_files("surefoot", "tools") if p.stat().st_size and not ast.get_docstring(parsed(p))
    ]
    assert not wrong, f"no module docstring: {', '.join(wrong)}"


@pytest.mark.parametrize("readme", readme_tree.READMES)
def test_the_readme_tree_is_the_real_one(readme):
    said, purpose = readme_tree.parse((ROOT / readme).read_text(encoding="utf-8"))
    assert said == readme_tree.real_tree(), "run `make tree`"
    assert all(purpose.values()), f"say what these folders are for: {[f for f, text in purpose.items() if not text]}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_host_logic_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, f"importing {module} imports torch"


def test_help_is_cheap():
    code = (
        "import sys; from surefoot.cli.main import run_cli; run_cli(['--help']); run_cli(['run', '--help']);"
        "print(sorted({'torch', 'transformers', 'rich', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
