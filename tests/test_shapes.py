"""The shapes in the signatures of `method` and `flow` are those that the programs of a step give and take.

In a process of its own: what checks them, jaxtyping's import hook with beartype, must be there before the modules.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import small_run

# A whole number will do for a float.
HOOK = """
from jaxtyping import TypeCheckError, install_import_hook
checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
with install_import_hook(["rcgrpo_jax.method", "rcgrpo_jax.flow"], checker):
    import jax, jax.numpy as jnp, small_run
    from rcgrpo_jax.method import surrogate
    from rcgrpo_jax.flow import schedule
    from rcgrpo_jax.plan.programs import Workload, open_flux
    from rcgrpo_jax.plan.topology import Topology
"""
# What every distance, neighbourhood and anchor mode calls, traced and neither compiled nor run.
TRACE = """
options = small_run.make_options(**{changes!r})
planned = Workload(options, open_flux(options.model.path), Topology("local", tuple(jax.devices()[:1]), None, None))
with jax.set_mesh(planned.mesh):
    planned.programs.explore.eval_shape(jax.random.key(0), planned.trees["prompts"], 0)
    for name in ("rollout", "update"):
        getattr(planned.programs, name).eval_shape(*planned.arguments(name))
"""
WRONG = """
states = jnp.zeros((4, 6, 3))
surrogate.squared_distance(states, states)
for call in (lambda: surrogate.squared_distance(states, states[:, :5]), lambda: schedule.sigmas("4", 256)):
    try:
        call()
    except TypeCheckError:
        print("refused")
"""


def run(code: str) -> str:
    environment = small_run.environment()
    environment["PYTHONPATH"] += f":{Path(__file__).parent}"
    found = subprocess.run([sys.executable, "-c", HOOK + code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"explore__kind": "mixed", "surrogate__distance": "tau", "objective__source_advantage": 1.0},
            marks=pytest.mark.slow,
        ),
        {"surrogate__anchor_mode": "integrate", "surrogate__weighting": "policy", "surrogate__distance": "region"},
        pytest.param({"explore__kind": "global", "surrogate__distance": "mean"}, marks=pytest.mark.slow),
        pytest.param(
            {"policy": "gaussian", "sde__noise": "region", "objective__kl_weight": 0.1}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_step_gives_and_takes_the_shapes_that_are_written(changes):
    run(TRACE.format(changes=changes))


def test_a_wrong_shape_is_refused():
    assert run(WRONG).splitlines() == ["refused", "refused"]
