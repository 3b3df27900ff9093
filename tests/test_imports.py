"""What imports what: a package that loads nothing heavy, and layers that only look down."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rcgrpo_jax"
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
# What a layer may import besides itself and the ground. Names side by side do not use each other.
GROUND = ("borders", "errors", "filetypes", "options", "orbax", "progress", "whole")
LAYERS = [
    ("method",),
    ("flow", "models", "data"),
    ("parallel", "weights"),
    ("rewards",),
    ("editors",),
    ("encoding",),
    ("evaluation", "runs"),
    ("masking",),
    ("rl",),
    ("sft",),
    ("experiments", "training"),
    ("report", "plan", "study"),
    ("cli",),
    ("__main__",),
]
MAX_LINES = 350


def imported(module: str) -> Iterator[str]:
    """The modules of the package that a module's code imports, anywhere in the file."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE.name)


def layer(module: str) -> int | None:
    """The position of a module's layer; None for the ground and the package itself."""
    name = module.split(".")[1:2]
    return next((i for i, names in enumerate(LAYERS) if name and name[0] in names), None)


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
    assert not loaded & {
        "torch",
        "diffusers",
        "tensorflow",
        "transformers",
        "tensorflow_datasets",
        "peft",
        "onnxruntime",
    }


def test_no_import_is_relative():
    relative = [
        f"{module}, line {node.lineno}"
        for module, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, listed("These imports are relative:", relative)


def test_every_module_has_its_layer():
    homeless = [module for module in FILES if layer(module) is None and module.partition(".")[2] not in ("", *GROUND)]
    assert not homeless, listed("These modules are in no layer:", homeless)


def test_imports_look_down():
    climbing = [
        f"{module} imports {name}"
        for module in FILES
        for name in imported(module)
        if layer(name) is not None and not is_below(name, module)
    ]
    assert not climbing, listed("These imports do not look down:", climbing)


def is_below(name: str, module: str) -> bool:
    """Whether a module may import another, which is in a layer; the ground may import no such one."""
    own = layer(module)
    return own is not None and (layer(name) < own or name.split(".")[1] == module.split(".")[1])


def listed(title: str, offenders: list[str]) -> str:
    return "\n  ".join((title, *offenders))


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


def test_files_are_short():
    lines = {module: len(file.read_text().splitlines()) for module, file in FILES.items()}
    long = [f"{module}: {count} lines" for module, count in lines.items() if count > MAX_LINES]
    assert not long, listed(f"These files have more than {MAX_LINES} lines:", long)
