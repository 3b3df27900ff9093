"""Solvers of the flow's ODE by name; the option `rollout.solver` and the flag `--solver` choose one."""

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.flow.solvers.base import Solver
from rcgrpo_jax.flow.solvers.dpmpp_2m import DPMpp2M
from rcgrpo_jax.flow.solvers.euler import EULER
from rcgrpo_jax.flow.solvers.heun import Heun

SOLVERS: dict[str, Solver] = {"euler": EULER, "heun": Heun(), "dpmpp_2m": DPMpp2M()}


def num_evaluations(name: str, num_steps: int) -> int:
    """Evaluations of the velocity in a rollout of K steps."""
    return sum(SOLVERS[name].evaluations(num_steps))


def steps_problem(name: str, num_steps: int, field: str) -> str:
    """What is wrong with so few steps of a solver, which the field of that name chose; empty if nothing."""
    least = SOLVERS[name].least_steps
    few = f"{num_steps} with {field} {name} found; {least} or more were wanted, since with fewer it is euler"
    return few if num_steps < least else ""


def choose_solver(name: str, num_steps: int) -> Solver:
    """The solver of edits of so many steps.

    Raises:
        UsageError: None has that name, or with so few steps it is Euler's.
    """
    if name not in SOLVERS:
        raise UsageError(f"--solver: {name!r} found; one of {', '.join(SOLVERS)} was wanted.", "Name one of these.")
    if few := steps_problem(name, num_steps, "--solver"):
        raise UsageError(f"--steps: {few}.", "Take more steps, or --solver euler.")
    return SOLVERS[name]
