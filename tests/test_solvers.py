"""Solvers by name: values computed beforehand, their orders, diffusers' steps, and what a rollout of them costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from references import diffusers, torch

from benchmarks import solvers as benchmark
from rcgrpo_jax.editors.base import Masses
from rcgrpo_jax.editors.model import _sample
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.edit import _edit_latents
from rcgrpo_jax.flow import rollout, schedule
from rcgrpo_jax.flow.solvers import SOLVERS, choose_solver, num_evaluations
from rcgrpo_jax.flow.solvers.base import Velocity
from rcgrpo_jax.flow.solvers.dpmpp_2m import multistep_weights
from rcgrpo_jax.flow.solvers.euler import euler_step
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.policy.base import Velocities
from rcgrpo_jax.rl.policy.neighbour import Neighbour

HIGHER = ["heun", "dpmpp_2m"]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def exact_sigmas(num_steps: int, mu: float) -> np.ndarray:
    """`schedule.sigmas` in float64, for a shift."""
    linear = np.linspace(1, 1 / num_steps, num_steps)
    return np.append(np.exp(mu) / (np.exp(mu) + 1 / linear - 1), 0.0)


# Data x_0 ~ N(0.7, 0.4^2), each number by itself: velocity and solution are known.

MEAN, VARIANCE = 0.7, 0.16
START = np.array([[-1.3, 0.2, 1.9]])


def spread(sigma):
    return VARIANCE * (1 - sigma) ** 2 + sigma**2


def velocity(x, sigma):
    return (sigma - VARIANCE * (1 - sigma)) / spread(sigma) * (x - MEAN * (1 - sigma)) - MEAN


def solution(x, sigma, sigma_next):
    return MEAN * (1 - sigma_next) + np.sqrt(spread(sigma_next) / spread(sigma)) * (x - MEAN * (1 - sigma))


def states(solver: str, sigmas: np.ndarray, start: np.ndarray = START, velocity=velocity) -> np.ndarray:
    return np.asarray(rollout.integrate(velocity, jnp.asarray(start), sigmas, SOLVERS[solver]))


@pytest.mark.parametrize(
    ("solver", "wanted"),
    [
        ("euler", [0.33751776, 0.75576650, 1.22978173]),
        ("heun", [0.28388060, 0.76401837, 1.30817450]),
        ("dpmpp_2m", [0.30631641, 0.76056671, 1.27538371]),
    ],
)
def test_a_rollout_ends_at_the_values_of_another_program(float64, solver, wanted):
    np.testing.assert_allclose(states(solver, exact_sigmas(8, 0.8))[-1, 0], wanted, atol=5e-9)


def test_every_state_of_2m_is_that_of_another_program(float64):
    wanted = [0.2, 0.26513281, 0.35599982, 0.49480063, 0.73645976]
    np.testing.assert_allclose(states("dpmpp_2m", exact_sigmas(4, 0.8))[:, 0, 1], wanted, atol=5e-9)


@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.8])
def test_weights_do_not_depend_on_the_shift_and_are_0_where_a_step_is_eulers(mu):
    wanted = [0, 0, 0.34685952, 0.43453319, 0.5, 0.57533005, 0.72075288, 0]
    np.testing.assert_allclose(multistep_weights(exact_sigmas(8, mu)), wanted, atol=5e-9)
    np.testing.assert_allclose(multistep_weights(exact_sigmas(8, mu)[:5]), wanted[:4], atol=5e-9)  # of a part
    for few in (1, 2):
        assert not multistep_weights(exact_sigmas(few, mu)).any()


@pytest.mark.parametrize(
    ("solver", "times", "order"),
    [
        ("euler", (1.0, 0.0), 1),
        ("heun", (1.0, 0.0), 2),
        ("euler", (0.95, 0.05), 1),
        ("heun", (0.95, 0.05), 2),
        ("dpmpp_2m", (0.95, 0.05), 2),  # from 1 to 0 its order climbs slowly: lambda's last steps do not shrink
    ],
)
def test_orders(float64, solver, times, order):
    start, steps = solution(START, 1.0, times[0]), np.array([32, 64, 128])
    errors = [
        np.abs(states(solver, np.linspace(*times, k + 1), start)[-1] - solution(start, *times)).max()
        for k in steps.tolist()
    ]
    assert abs(np.polyfit(np.log(steps), np.log(errors), 1)[0] + order) < 0.1


# A velocity without a solution that is known


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


MATRIX = random(3, 3) / 3


def curved(x, sigma):
    return jnp.tanh(x @ jnp.asarray(MATRIX, x.dtype)) * (1 + sigma) - x


def test_2m_is_euler_bit_for_bit_in_its_first_second_and_last_step():
    """Compiled as outside of the tests, whose level of optimization rounds a sum in one program as not in another."""
    sigmas, start = schedule.sigmas(6, 1024), random(5, 3)

    @functools.partial(jax.jit, static_argnums=(1, 2), compiler_options={"xla_backend_optimization_level": 3})
    def found(start, solver, first=0):
        return rollout.integrate(curved, start, sigmas[first:], SOLVERS[solver])

    several, euler = found(start, "dpmpp_2m"), found(start, "euler")
    np.testing.assert_array_equal(several[:3], euler[:3])
    assert not np.array_equal(several[3], euler[3])
    np.testing.assert_array_equal(several[-2:], found(several[-2], "euler", 5))


def states_of(start, sigmas, name):
    return rollout.integrate(curved, start, sigmas, SOLVERS[name])


@pytest.mark.parametrize("num_steps", [2, 3, 8, 20])
@pytest.mark.parametrize("solver", HIGHER)
def test_steps_are_those_of_diffusers(solver, num_steps):
    sigmas, start = schedule.sigmas(num_steps, 1024), random(5, 3)
    if solver == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(num_steps)
        pairs = np.concatenate([sigmas[:1], sigmas[1:-1].repeat(2), sigmas[-1:]])
        scheduler.sigmas, scheduler.timesteps = torch.from_numpy(pairs), torch.from_numpy(1000 * pairs[:-1])
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++",
            solver_type="midpoint", final_sigmas_type="zero",
        )  # fmt: skip
        scheduler.set_timesteps(num_steps)
        pairs, scheduler.sigmas = sigmas, torch.from_numpy(sigmas)
    scheduler.set_begin_index(0)
    x, evaluate = torch.from_numpy(start), jax.jit(curved)
    for sigma, timestep in zip(pairs, scheduler.timesteps, strict=False):  # a last time has no step
        v = torch.from_numpy(np.array(evaluate(x.numpy(), sigma)))
        x = scheduler.step(v, timestep, x).prev_sample
    assert len(scheduler.timesteps) == num_evaluations(solver, num_steps)
    np.testing.assert_allclose(states(solver, sigmas, start, curved)[-1], x.numpy(), atol=1e-5)


@pytest.mark.parametrize("solver", HIGHER)
def test_a_sample_of_many_remembers_its_own_steps(solver):
    sigmas, starts = schedule.sigmas(5, 1024), random(4, 5, 3)
    found = jax.jit(jax.vmap(functools.partial(states_of, sigmas=sigmas, name=solver)))(starts)
    for i, start in enumerate(starts):
        np.testing.assert_allclose(found[i], states(solver, sigmas, start, curved), atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize(("solver", "a_step"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 1)])
def test_a_rollout_evaluates_the_model_as_often_as_it_says(solver, a_step, num_steps):
    times, sigmas = [], schedule.sigmas(num_steps, 1024)

    def observed(x, sigma):
        jax.debug.callback(lambda sigma: times.append(float(sigma)), sigma)
        return curved(x, sigma), {"sigma": sigma, "x": x}

    found, aux = jax.jit(lambda x: rollout.integrate_with_aux(observed, x, sigmas, SOLVERS[solver]))(random(5, 3))
    jax.effects_barrier()
    assert len(times) == num_evaluations(solver, num_steps) == a_step * (num_steps - 1) + 1
    assert set(times) == set(sigmas[:-1].tolist())  # never at sigma = 0
    np.testing.assert_array_equal(aux["sigma"], sigmas[:-1])  # of each step's first evaluation
    np.testing.assert_array_equal(aux["x"], found[:-1])


# Anchors


def neighbour(sigmas: np.ndarray, **changes) -> Neighbour:
    options = small_run.make_options(rollout__num_steps=len(sigmas) - 1, **changes).step
    return Neighbour(options, None, sigmas)


def replayed(policy: Neighbour, theta: Velocity, paths: jax.Array, anchor: int, steps: jax.Array) -> tuple:
    """What an anchor's states under theta come from."""
    stored = policy.read(paths[None], (0, jnp.full_like(steps, anchor), steps))
    return Velocities(theta, None, None, None), stored, steps


@pytest.mark.parametrize("steps", ["all", "early"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_integrated_anchors_differentiate_the_solvers_own_path(float64, solver, steps):
    sigmas, start = exact_sigmas(6, 0.6), np.float64(random(5, 3))
    policy = neighbour(sigmas, rollout__solver=solver, surrogate__anchor_mode="integrate", surrogate__steps=steps)
    path, _ = policy.rollout(lambda x, sigma: (curved(x, sigma), None), None, jnp.asarray(start))
    compared = jnp.arange(1, 4 if steps == "early" else 7)
    rng = np.random.default_rng(1)
    pull, direction = rng.standard_normal((len(compared), 5, 3)), rng.standard_normal((3, 3))

    @jax.jit
    def loss(t):
        def moved(x, sigma):
            return curved(x, sigma) + x @ (t * direction)

        before, after = policy._anchor_states(*replayed(policy, moved, path[None], 0, compared))
        return jnp.sum(pull * after), (before, after)

    (_, (before, after)), gradient = jax.value_and_grad(loss, has_aux=True)(0.0)
    np.testing.assert_allclose(before, path[compared - 1], atol=1e-12)
    np.testing.assert_allclose(after, path[compared], atol=1e-12)
    length = 1e-5
    difference = (loss(length)[0] - loss(-length)[0]) / (2 * length)
    assert gradient == pytest.approx(float(difference), rel=1e-7)


@pytest.mark.parametrize(
    ("solver", "wanted"),
    [
        ("dpmpp_2m", [0.07440515, 0.08151586, 0.00015838, 0.02658487]),
        ("euler", [0.06732793, 0.07306686, 0.0, 0.02268544]),
    ],
)
def test_a_replayed_anchor_is_one_step_of_eulers_from_the_stored_state(float64, solver, wanted):
    sigmas, i, step = exact_sigmas(8, 0.8), np.arange(4), 6
    starts = START + 0.3 * np.stack([np.sin(i), np.cos(i), np.sin(2 * i)], -1)[:, None]  # [G, N, C]
    policy = neighbour(sigmas, rollout__solver=solver)
    paths = jnp.stack(
        [policy.rollout(lambda x, sigma: (velocity(x, sigma), None), None, x)[0] for x in jnp.asarray(starts)]
    )
    before, after = policy._anchor_states(*replayed(policy, velocity, paths, 2, jnp.array([step])))
    np.testing.assert_array_equal(before[0], paths[2, step - 1])
    np.testing.assert_array_equal(after[0], euler_step(velocity, before[0], *jnp.asarray(sigmas[step - 1 : step + 1])))
    np.testing.assert_allclose(jnp.square(paths[:, step] - after).sum((1, 2)), wanted, atol=5e-9)


# Editors, what is refused, and the benchmark


class Curve:
    """Networks of the velocity `curved`; all attention is in the region at time 1, and less of it later."""

    def sigmas(self, num_steps, num_image_tokens):
        return schedule.sigmas(num_steps, num_image_tokens)

    def velocity(self, params, lora, x, sigma, condition, grid, region=None, own=None):
        total = jnp.ones((1, 2))
        return curved(x, sigma), None if region is None else Masses(sigma * total, total)


@pytest.mark.parametrize("solver", SOLVERS)
def test_edits_are_the_solvers(solver):
    noise, grid, num_steps = random(2, 4, 3), (2, 2), 3
    wanted = states(solver, schedule.sigmas(num_steps, 4), noise, curved)[-1]
    np.testing.assert_allclose(_sample(Curve(), {}, {}, noise, None, grid, num_steps, solver), wanted, atol=1e-6)
    mesh, inputs = make_mesh({}, jax.devices()[:1]), (jnp.zeros(2), jnp.ones((2, 32, 32)), noise, None)
    with jax.set_mesh(mesh):
        found, densities = _edit_latents(Curve(), {}, {}, inputs, grid, mesh, lambda x: x, num_steps, solver)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert densities.shape == (2, num_steps, 1)


@pytest.mark.parametrize(("solver", "least"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 3)])
def test_a_solver_with_so_few_steps_that_it_is_eulers_is_refused(solver, least):
    assert choose_solver(solver, least) is SOLVERS[solver]
    validate(small_run.make_config(rollout__solver=solver, rollout__num_steps=least), 1)
    if least > 1:
        np.testing.assert_array_equal(*(states(x, schedule.sigmas(least - 1, 4)) for x in (solver, "euler")))
        found = f"{least - 1} with {{}} {solver} found; {least} or more were wanted, since with fewer it is euler"
        with pytest.raises(UsageError) as error:
            choose_solver(solver, least - 1)
        assert error.value.problem == f"--steps: {found.format('--solver')}."
        with pytest.raises(UsageError) as error:
            validate(small_run.make_config(rollout__solver=solver, rollout__num_steps=least - 1), 1)
        assert f"rollout.num_steps: {found.format('rollout.solver')}" in error.value.problem


def test_a_name_of_none_is_refused():
    with pytest.raises(UsageError, match="--solver: 'hein' found; one of euler, heun, dpmpp_2m was wanted"):
        choose_solver("hein", 8)
    with pytest.raises(UsageError, match=r"rollout\.solver: 'hein' found; one of euler, heun, dpmpp_2m was wanted"):
        validate(small_run.make_config(rollout__solver="hein"), 1)


def test_the_benchmark_has_a_row_of_each_solver_and_number_of_steps_at_which_it_is_not_eulers(tmp_path):
    asked = []

    def pictures(solver, steps):
        asked.append((solver, steps))
        return np.full((2, 4, 4, 3), 100.0 + (steps < 9) / steps)

    rows = [*benchmark.measure(pictures, (2, 8), reference=9)]
    wanted = [("euler", 2, 2), ("euler", 8, 8), ("heun", 2, 3), ("heun", 8, 15), ("dpmpp_2m", 8, 8)]
    assert [(row.solver, row.steps, row.evaluations) for row in rows] == wanted
    assert asked == [("euler", 9), *(row[:2] for row in wanted)]
    for row in rows:
        np.testing.assert_allclose(row.psnr, 20 * np.log10(255 * row.steps))
    benchmark.draw(rows, 9, tmp_path / "new" / "plot.svg")
    text = (tmp_path / "new" / "plot.svg").read_text()
    assert all(f">{shown}<" in text for shown in (*SOLVERS, "evaluations of the model", "15"))
