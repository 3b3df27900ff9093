"""`rcgrpo data COMMAND`: what makes data sets; each command is a file `cli/data_NAME.py` with `run(argv)`."""

from __future__ import annotations

import importlib
import sys

from rcgrpo_jax.errors import UsageError, nearest

COMMANDS = {
    "scenes": "synthetic editing tasks -> a folder of PNG files",
    "prepare": "a published data set, or tables of your own -> ArrayRecord files",
    "mask": "examples without masks -> a folder with masks",
    "preview": "which aspect-ratio bucket each picture falls into, and what is cut of it",
    "encode": "the encodings of a run's data, ahead of the run",
}
USAGE = "usage: rcgrpo data COMMAND [--FLAG=VALUE ...]\n\ncommands:\n" + "\n".join(
    f"  {name:<9} {about}" for name, about in COMMANDS.items()
)


def run(argv: list[str]) -> int | None:
    if argv and argv[0] in ("--help", "-h", "-help"):
        print(f"{USAGE}\n\n`rcgrpo data COMMAND --help` lists the flags of a command.")
        sys.exit(0)
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        found = f"unknown command {name!r}" if argv else "no command"
        raise UsageError(
            f"data: {found}; {', '.join(COMMANDS)} was wanted." + (f" Did you mean {near!r}?" if near else ""),
            "`rcgrpo data --help` describes them; the command comes before its flags.",
        )
    return importlib.import_module(f"rcgrpo_jax.cli.data_{name}").run(argv[1:])
