"""The `rcgrpo` command: picks the command, turns errors into two lines and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from rcgrpo_jax.cli.surroundings import jax_options, surroundings
from rcgrpo_jax.errors import STOPPED, UsageError, UserError, nearest
from rcgrpo_jax.parallel.slurm import launched_processes

COMMANDS = {
    "convert": "released weights -> a directory of Orbax checkpoints",
    "edit": "edit one image",
    "sft": "supervised training: autoencoder, flow, or a LoRA on your own triples",
    "train": "post-train a LoRA with RC-GRPO",
    "plan": "whether a run fits on TPUs or GPUs and what it takes, by the compiler",
    "evaluate": "how well a model edits, with and without a LoRA",
    "judge": "whether a reward can tell good edits from bad, before a run learns from it",
    "diagnose": "which blocks' attention tells good edits from bad: what acd.layers should be",
    "study": "a page that asks people which edits they prefer, and what their votes say",
    "ablate": "variants of a run against each other, several seeds each",
    "report": "one HTML page about a run",
    "export": "a trained LoRA -> diffusers format",
    "data": "make data sets",
    "demo": "the whole way on the small editor that ships with the package",
}
ALIASES = {"pretrain": "sft"}  # earlier name -> command
DISTRIBUTED = ("train", "sft", "evaluate", "data encode")  # commands of which several processes make one run
USAGE = "usage: rcgrpo COMMAND [--FLAG=VALUE ...]\n\ncommands:\n" + "\n".join(
    f"  {name:<9} {about}" for name, about in COMMANDS.items()
)

NOT_FORESEEN = "This was not foreseen; run again with --debug for the traceback, and please report it."
REMEDIES = {  # of JAX's errors, by what they say
    "RESOURCE_EXHAUSTED": "The device has too little memory: lower rollout.micro_batch, rollout.decode_micro_batch or "
    "surrogate.micro_batch (--batch of evaluate), or spread the model by mesh.fsdp; `rcgrpo plan` tells what fits.",
    "Unable to initialize backend": "Another process may hold the device: wait for it, or set JAX_PLATFORMS=cpu.",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a failure, 2 for a usage error, 143 if SIGTERM stopped it."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    with surroundings(debug):
        return _main(argv, debug)


def _main(argv: list[str], debug: bool) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE + "\n\n`rcgrpo COMMAND --help` lists the flags of a command.")
        return 0 if argv else 2
    code = _run([ALIASES.get(argv[0], argv[0]), *argv[1:]], debug)
    if code not in (0, STOPPED):  # processes that stop do so together, in order
        _leave(code)
    return code


def _run(argv: list[str], debug: bool) -> int:
    try:
        if argv[0] not in COMMANDS:
            raise UsageError(_unknown(argv[0]), f"Use one of {', '.join(COMMANDS)}.")
        whole = " ".join(argv[: 2 if argv[0] == "data" else 1])
        if whole not in DISTRIBUTED and (count := launched_processes(os.environ)) > 1:
            raise UsageError(
                f"one of {count} processes; {', '.join(DISTRIBUTED)} alone spread their work over several.",
                "Run it once, in a single process.",
            )
        command = importlib.import_module(f"rcgrpo_jax.cli.{argv[0]}")
        with jax_options():
            return command.run([arg for arg in argv[1:] if arg != "--debug"]) or 0
    except UserError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"rcgrpo {argv[0]}: error: {error.problem}\n  {error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"rcgrpo {argv[0]}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 1
        reason = " ".join(str(error).split())[:500]
        remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in reason), NOT_FORESEEN)
        print(f"rcgrpo {argv[0]}: error: {type(error).__name__}: {reason}\n  {remedy}", file=sys.stderr)
        return 1


def _leave(code: int) -> None:
    if "jax" in sys.modules:  # else there can be no other processes
        from rcgrpo_jax.parallel import distributed

        distributed.exit_at_once(code)


def _unknown(name: str) -> str:
    near = nearest(name, COMMANDS)
    return f"unknown command {name!r}." + (f" Did you mean {near!r}?" if near else "")


if __name__ == "__main__":
    sys.exit(main())
