"""What imports what: a package that loads nothing heavy, and layers that only look down."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rcgrpo_jax"
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
# What a layer may import besides itself and the ground. Names side by side do not use each other.
GROUND = ("borders", "errors", "filetypes", "orbax", "progress")
LAYERS = [
    ("method",),
    ("flow", "models", "data"),
    ("rewards", "parallel", "weights"),
    ("editors",),
    ("encoding",),
    ("evaluation", "runs"),
    ("rl",),
    ("sft",),
    ("experiments",),
    ("report", "plan"),
    ("cli",),
]
MAX_LINES = 400


def imported(module: str) -> Iterator[str]:
    """The modules of the package that a module's code imports, anywhere in the file."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
            names = [name if name in FILES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE.name)


def layer(module: str) -> int | None:
    """The position of a module's layer; None for the ground and the package itself."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in GROUND:
        return None
    return next(i for i, names in enumerate(LAYERS) if parts[1] in names)


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return set(run.stdout.split())


def test_the_package_itself_loads_nothing():
    loaded = loaded_after(f"import {PACKAGE.name}")
    assert PACKAGE.name in loaded
    assert not loaded & {"jax", "numpy", "torch", "tensorflow", "transformers"}


def test_no_module_loads_another_framework():
    loaded = loaded_after("\n".join(f"import {module}" for module in FILES))
    assert set(FILES) <= loaded
    assert not loaded & {"torch", "diffusers", "tensorflow", "transformers", "tensorflow_datasets", "peft"}


@pytest.mark.parametrize("module", FILES)
def test_imports_look_down(module):
    own = layer(module)
    for name in imported(module):
        below = layer(name)
        if own is None:
            assert below is None, f"{module} is ground and imports {name}"
        elif below is not None and module.split(".")[1] != name.split(".")[1]:
            assert below < own, f"{module} imports {name}, which is not below it"


def test_no_two_files_import_each_other():
    graph = {module: {name for name in imported(module) if name != module} for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module):
    assert len(FILES[module].read_text().splitlines()) <= MAX_LINES
