"""`rcgrpo convert SRC DST`."""

from __future__ import annotations

from absl import flags

from rcgrpo_jax.cli.arguments import dtype_of, parse
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import check_name, expand_home, path_flag
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import parameter_sharding
from rcgrpo_jax.progress import Jobs
from rcgrpo_jax.weights.convert import convert
from rcgrpo_jax.weights.load import on_default_device

ABOUT = """Converts a diffusers folder, a hub id (owner/name) or the transformer of a single file into Orbax parameters.

A single file is in BFL's layout or diffusers', under any prefix; other networks beside it are named and left out.
Float8 weights, with scales or without, are stored as bfloat16 unless --dtype says otherwise.

Every tensor must be there, of the right shape and finite; otherwise each one that is not is named, the exit code is 1
and nothing is written."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("base", "diffusers folder that gives the other networks to a single file", values)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "dtype to store; the files' by default", values)


def run(argv: list[str]) -> None:
    values, paths = parse("convert", ABOUT, argv, _flags, ("src", "dst"))
    source, destination = (expand_home(name, path) for name, path in zip(("SRC", "DST"), paths, strict=True))
    check_name("DST", destination)
    sharding_of = on_default_device
    if len(open_devices()) > 1:
        sharding_of = parameter_sharding(make_mesh({"fsdp": -1}))
    with Jobs(lines=4) as progress:
        counts = convert(
            source,
            destination,
            base=values.base,
            dtype=dtype_of(values.dtype) if values.dtype else None,
            sharding_of=sharding_of,
            progress=progress,
        )
    for name, count in counts.items():
        print(f"{name:<16} {count:>14,} parameters")
    print(f"converted to {destination}")
    if "vae" not in counts:
        print("only the transformer: to edit or train, convert with --base FOLDER, which gives the other networks")
