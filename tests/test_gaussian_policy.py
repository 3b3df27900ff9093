"""The policy `gaussian`: what it explores, rolls out and minimises, on networks of one matrix."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from test_config import make, problems
from test_seams import Matrix

from rcgrpo_jax.flow import sde
from rcgrpo_jax.flow.solvers.dpmpp_2m import DPMpp2M
from rcgrpo_jax.flow.solvers.euler import EULER
from rcgrpo_jax.models.config import MMDiTConfig, VAEConfig
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.plan import flops
from rcgrpo_jax.report import run_record
from rcgrpo_jax.rl.parts import join, split_groups
from rcgrpo_jax.rl.policy.base import Rollout
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.runs.state import new_state

P, G, K, N, C = 2, 4, 6, 16, 3
MASK = np.zeros((P, 64, 64), np.float32)
MASK[:, :32] = 1.0  # of 4 x 4 tokens, the upper half
ADVANTAGES = np.float32([[1.0, -1.0, 0.5, 0.0], [0.5, 0.5, -1.0, 2.0]])
PARAMS = {"W": np.random.default_rng(0).standard_normal((C, C), np.float32)}
ADAPTER = {"B": 0.1 * np.random.default_rng(1).standard_normal((C, C), np.float32)}
SOURCE = np.random.default_rng(2).standard_normal((P, N, C), np.float32)
WINDOW = {"sde__window": 2, "sde__interval": 1}  # it moves with every step
KL = WINDOW | {"objective__kl_weight": 0.3}
REGION = {"sde__noise": "region", "explore__alpha_edit": 0.8, "explore__alpha_base": 0.2, "objective__kl_weight": 0.1}


class Plain(Matrix):
    """Its velocity ends in a matrix product, as a transformer's does: no compiler merges it with the step after it."""

    def velocity(self, params, lora, x, sigma, condition, grid, region=None, own=None):
        return (jnp.tanh(x) * (1 + sigma) - condition) @ (params["W"] + lora.get("B", 0.0)), None


class Given(NamedTuple):
    """What an update reads."""

    prompts: Any
    exploration: Any
    rollout: Rollout


@functools.cache
def programs(devices: int = 1, **changes: Any) -> Programs:
    settings = {
        "policy": "gaussian", "rollout__prompts": P, "rollout__group_size": G, "rollout__num_steps": K,
        "acd__weight": 0.0, "explore__kind": "global", "explore__sigma": 1.0, "lora__rank": 1, "lora__alpha": 1.0,
        "optimizer__max_grad_norm": 1e9, "objective__clip": 1e-4, "surrogate__anchors": 1,
    }  # fmt: skip
    options = small_run.make_options(**settings | changes)
    return Programs(options.step, Plain(), make_mesh({"fsdp": -1}, jax.devices()[:devices]))


def explore(of: Programs, step: int = 0, seed: int = 0) -> tuple[Any, Any]:
    """Prompts and exploration."""
    with jax.set_mesh(of.mesh):
        prompts = of.gather_prompts({"latents": SOURCE}, MASK)
        return prompts, of.explore(jax.random.key(seed), prompts, jnp.asarray(step))


def roll_out(of: Programs, step: int = 0, at_a_time: int = G, adapter: dict = ADAPTER) -> Given:
    prompts, exploration = explore(of, step)
    with jax.set_mesh(of.mesh):
        parts = split_groups(exploration.candidates, at_a_time)
        return Given(prompts, exploration, join(*(of.rollout(PARAMS, adapter, prompts, part) for part in parts)))


class Result(NamedTuple):
    gradient: np.ndarray
    log_pi: np.ndarray
    metrics: dict[str, float]


def update(of: Programs, given: Given, adapter: dict = ADAPTER, log_old: Any = None) -> Result:
    """The first update on a rollout, or one that compares with `log_old`."""
    first, kept = log_old is None, np.zeros(of.policy.kept_shape(), np.float32) if log_old is None else log_old
    with jax.set_mesh(of.mesh):
        state = new_state(of.options.optimizer, jax.tree.map(jnp.asarray, adapter), jax.random.key(0))
        data = *given, jnp.asarray(ADVANTAGES), jnp.asarray(kept), jnp.asarray(first)
        after, log_pi, metrics = of.update(PARAMS, state, *data)
    gradient = optax.tree.get(after.opt_state, "mu")["B"] / (1 - of.options.optimizer.b1)
    return Result(np.asarray(gradient), np.asarray(log_pi), jax.tree.map(float, metrics))


def velocity(weights: Any, x: Any, sigma: Any) -> Any:
    """Of all candidates."""
    return (jnp.tanh(x) * (1 + sigma) - SOURCE[:, None]) @ weights


def mean_and_std(of: Programs, weights: Any, x: Any, k: int) -> tuple[Any, float]:
    """Of step k, counted from 0, from its formula."""
    kappa, std = sde.coefficients(of.options.sde.kind, of.sigmas, of.options.sde.level)
    s, t, v = of.sigmas[k], of.sigmas[k + 1], velocity(weights, x, of.sigmas[k])
    return x + (t - s) * v + np.float32(kappa[k]) * (x + (1 - s) * v), np.float32(std[k])


def noises(of: Programs, given: Given, steps: range) -> np.ndarray:
    """z of the rollout's steps, [steps, P, G, N, C]."""
    found = []
    for k in steps:
        mean, std = mean_and_std(of, PARAMS["W"] + ADAPTER["B"], given.rollout.states[:, :, k], k)
        found.append((given.rollout.states[:, :, k + 1] - mean) / std)
    return np.stack(found)


def test_with_sigma_1_initial_noises_are_independent_and_with_0_they_are_one_for_a_group():
    _, found = explore(programs())
    _, key_deltas, *_ = jax.random.split(jax.random.key(0), 4)
    keys = jax.random.split(key_deltas, P)
    wanted = jax.vmap(lambda key: jax.random.normal(key, (G, N, C)))(keys)  # the reference has no part in them
    np.testing.assert_array_equal(found.candidates.noise, wanted)
    _, shared = explore(programs(explore__sigma=0.0))
    noise = np.asarray(shared.candidates.noise)
    np.testing.assert_array_equal(noise, np.repeat(noise[:, :1], G, 1))
    assert (noise[0] != noise[1]).all()


@pytest.mark.parametrize(
    ("changes", "random"),
    [({"sde__level": 0.0}, []), (WINDOW, [2, 3])],
    ids=["level 0", "window"],
)
def test_what_is_not_random_is_eulers_bit_for_bit(changes, random, monkeypatch):
    """Operation by operation: a compiler may round a product and a sum once, and in one program and not in another."""
    of = programs(**changes)
    monkeypatch.setattr(of.policy, "_step_noise", lambda *_: jnp.ones((N, C)))  # whatever it is
    prompts, exploration = explore(of, 2)
    candidate, prompt = jax.tree.map(lambda x: x[0, 1], exploration.candidates), jax.tree.map(lambda x: x[0], prompts)

    def v(x: Any, sigma: Any) -> Any:
        return of.networks.velocity(PARAMS, ADAPTER, x, sigma, prompt.condition, None)

    with jax.disable_jit():
        states, _ = of.policy.rollout(v, prompt, candidate)
        for k in range(K):
            (_, after), _ = EULER.integrate(v, states[k], of.sigmas[k : k + 2])
            if k in random:
                assert np.abs(after - states[k + 1]).mean() > 0.1
            else:
                np.testing.assert_array_equal(states[k + 1], after)


@pytest.mark.parametrize(
    "kind", ["flow_grpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cps", "dance"))]
)
def test_a_random_step_is_its_mean_and_a_noise_of_candidate_and_step(kind):
    of = programs(sde__kind=kind)
    given = roll_out(of)
    z = noises(of, given, range(K - 1))  # all but the last
    keys = jax.random.wrap_key_data(given.exploration.candidates.key)

    def draw(key: Any, index: Any, k: Any) -> Any:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, index + 1), k), (N, C))

    of_group = jax.vmap(jax.vmap(draw, (0, 0, None)), (0, 0, None))
    index = given.exploration.candidates.index
    wanted = jnp.stack([of_group(keys, index, k) for k in range(K - 1)])
    np.testing.assert_allclose(z, wanted, atol=2e-4)
    assert len(np.unique(wanted)) > 0.99 * wanted.size
    mean, _ = mean_and_std(of, PARAMS["W"] + ADAPTER["B"], given.rollout.states[:, :, K - 1], K - 1)
    np.testing.assert_allclose(given.rollout.states[:, :, K], mean, atol=1e-6)


def test_noise_by_region_is_shared_outside_of_the_mask():
    of = programs(**REGION)
    z = noises(of, roll_out(of), range(K - 1))
    assert z.std() == pytest.approx(1, abs=0.05)
    for tokens, alpha in ((slice(0, N // 2), 0.8), (slice(N // 2, N), 0.2)):
        pairs = (z[:, :, :, None, tokens] * z[:, :, None, :, tokens]).mean((0, 1, 4, 5))  # [G, G]
        np.testing.assert_allclose(pairs[~np.eye(G, dtype=bool)], 1 - alpha**2, atol=0.2)
    spread = (z - z[:, :, :1])[:, :, 1:].std((0, 1, 2, 4))  # of each token, sqrt(2) alpha
    np.testing.assert_allclose(spread.reshape(2, -1).mean(1), np.sqrt(2) * np.array([0.8, 0.2]), rtol=0.1)


@pytest.mark.parametrize(
    ("devices", "at_a_time"), [(1, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 1), (8, 4)))]
)
def test_every_micro_batch_and_mesh_has_the_same_states_and_losses(devices, at_a_time):
    one = roll_out(programs(**REGION))
    of = programs(devices, **REGION, surrogate__micro_batch=8)
    other = roll_out(of, at_a_time=at_a_time)
    np.testing.assert_allclose(other.rollout.states, one.rollout.states, atol=2e-6)
    moved = {"B": ADAPTER["B"] + 0.01}
    wanted, found = (
        update(made, given, moved, update(made, given).log_pi)
        for made, given in ((programs(**REGION), one), (of, other))
    )
    np.testing.assert_allclose(found.gradient, wanted.gradient, rtol=1e-3, atol=1e-6)
    assert found.metrics == pytest.approx(wanted.metrics, rel=1e-3, abs=1e-6)


def reference_loss(of: Programs, given: Given, steps: range, log_old: Any, kl_weight: float = 0.0, clip: float = 1e-4):
    """The loss from its formulas, as a function of the adapter: over prompts, candidates and steps."""

    def loss(adapter: Any) -> Any:
        total = 0.0
        for i, k in enumerate(steps):
            before, after = given.rollout.states[:, :, k], given.rollout.states[:, :, k + 1]
            mean, std = mean_and_std(of, PARAMS["W"] + adapter, before, k)
            base, _ = mean_and_std(of, PARAMS["W"], before, k)
            log_pi = (-0.5 * ((after - mean) / std) ** 2 - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)).mean((-2, -1))
            ratio = jnp.exp(log_pi - (jax.lax.stop_gradient(log_pi) if log_old is None else log_old[i]))
            gain = jnp.minimum(ADVANTAGES * ratio, ADVANTAGES * jnp.clip(ratio, 1 - clip, 1 + clip))
            total += (kl_weight * ((mean - base) ** 2).mean((-2, -1)) / (2 * std**2) - gain).mean()
        return total / len(steps)

    return loss


def test_the_first_update_has_ratio_1_and_the_closed_gradient():
    """`-mean A (z / S) d mean`, over candidates, steps of the window and elements."""
    of = programs(**WINDOW)
    given = roll_out(of, 1)
    found, steps = update(of, given), range(1, 3)
    z = noises(of, given, steps)

    def closed(adapter: Any) -> Any:
        means = (mean_and_std(of, PARAMS["W"] + adapter, given.rollout.states[:, :, k], k) for k in steps)
        pulls = (ADVANTAGES * (z / std * mean).mean((-2, -1)) for z, (mean, std) in zip(z, means, strict=True))
        return -sum(pull.mean() for pull in pulls) / len(steps)

    assert (found.metrics["ratio_mean"], found.metrics["ratio_deviation"]) == (1.0, 0.0)
    assert found.metrics["clip_fraction"] == 0
    assert found.metrics["random_step"] == 2.5  # steps 2 and 3, counted from 1
    np.testing.assert_allclose(found.gradient, jax.grad(closed)(ADAPTER["B"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, pytest.param({"objective__clip": 0.2}, marks=pytest.mark.slow)], ids=str)
def test_later_updates_are_clipped_and_have_a_kl_to_the_base(changes):
    of, clip = programs(**KL, **changes), changes.get("objective__clip", 1e-4)
    given = roll_out(of, 1)
    log_old, moved = update(of, given).log_pi, {"B": ADAPTER["B"] + 0.02}
    found, steps = update(of, given, moved, log_old), range(1, 3)
    by_step = log_old.reshape(P, G, len(steps)).transpose(2, 0, 1)
    loss = reference_loss(of, given, steps, by_step, 0.3, clip)
    assert found.metrics["loss"] == pytest.approx(float(loss(moved["B"])), rel=1e-4)
    assert found.metrics["kl"] > 1e-3
    assert (found.metrics["clip_fraction"] > 0.9) == (clip == 1e-4)
    np.testing.assert_allclose(found.gradient, jax.grad(loss)(moved["B"]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_the_difference_of_losses():
    of = programs(objective__kl_weight=0.3, objective__clip=0.5)
    given = roll_out(of)
    log_old, step = update(of, given).log_pi, 0.01
    direction = np.random.default_rng(3).standard_normal((C, C)).astype(np.float32)
    above, here, below = (update(of, given, {"B": ADAPTER["B"] + h * direction}, log_old) for h in (step, 0, -step))
    slope = (above.metrics["loss"] - below.metrics["loss"]) / (2 * step)
    assert slope == pytest.approx(float((here.gradient * direction).sum()), rel=5e-3)


def test_steps_outside_the_window_teach_nothing_whatever_their_states_are():
    of = programs(**KL)
    given = roll_out(of, 1)
    states = np.array(given.rollout.states)
    states[:, :, [0, 4, 5, 6]] = np.nan  # the window reads 1, 2 and 3
    wanted, found = update(of, given), update(of, given._replace(rollout=given.rollout._replace(states=states)))
    np.testing.assert_array_equal(found.gradient, wanted.gradient)
    assert found.metrics == wanted.metrics


@pytest.mark.slow
def test_the_published_log_probability_is_twice_the_variance_times_the_density_s():
    density, published = (programs(**WINDOW, sde__kind="cps", sde__log_prob=name) for name in ("density", "published"))
    given, moved = roll_out(density, 1), {"B": ADAPTER["B"] + 0.02}
    ratios = [update(of, given, moved).log_pi - update(of, given).log_pi for of in (density, published)]
    _, std = sde.coefficients("cps", density.sigmas, 0.7)
    np.testing.assert_allclose(ratios[1][:, 0, 0], np.tile(2 * std[1:3] ** 2, P * G) * ratios[0][:, 0, 0], rtol=2e-3)


def test_a_window_moves_with_the_steps_done_and_nothing_is_traced_again():
    traced = []

    class Counted(Plain):
        def velocity(self, *args: Any, **named: Any) -> Any:
            traced.append(1)
            return super().velocity(*args, **named)

    options = programs(**WINDOW).options
    of = Programs(options, Counted(), make_mesh({}, jax.devices()[:1]))
    starts, counts = [], []
    for step in range(6):
        given = roll_out(of, step)
        result = update(of, given)
        starts.append(int(given.exploration.candidates.start[0, 0]))
        assert result.metrics["random_step"] == starts[-1] + 1.5
        assert result.metrics["ratio_deviation"] == 0
        counts.append(len(traced))
    assert starts == [0, 1, 2, 3, 3, 3]
    assert counts == [counts[0]] * 6
    assert traced


def test_a_random_window_is_one_for_the_batch_and_another_in_another_step():
    of = programs(sde__window=2, sde__place="random", sde__range_start=1, sde__range_end=5)
    found = [np.asarray(explore(of, seed=seed)[1].candidates.start) for seed in range(20)]
    assert all((start == start[0, 0]).all() for start in found)
    assert {int(start[0, 0]) for start in found} == {1, 2, 3}


def test_after_the_window_2m_takes_the_steps_and_remembers_none_before():
    of, euler = programs(**WINDOW, rollout__solver="dpmpp_2m"), programs(**WINDOW)
    states, eulers = (np.moveaxis(np.asarray(roll_out(made).rollout.states), 2, 0) for made in (of, euler))
    with jax.set_mesh(of.mesh):

        @jax.jit
        def solve(start):
            weights = PARAMS["W"] + ADAPTER["B"]
            return DPMpp2M().integrate(lambda x, s: (velocity(weights, x, s), None), start, of.sigmas[2:])[0]

        np.testing.assert_allclose(solve(states[2]), states[2:], atol=1e-6)
    np.testing.assert_array_equal(states[:4], eulers[:4])  # its first step is Euler's
    assert np.abs(states[4] - eulers[4]).mean() > 1e-3


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"rollout__num_steps": 1}, "rollout.num_steps: 1 with policy = gaussian; 2 or more were wanted: the last"),
        ({"sde__window": 8}, "sde.window: 8 of rollout.num_steps = 8; at most 7 was wanted"),
        (
            {"sde__window": 3, "sde__place": "random", "sde__range_start": 2, "sde__range_end": 4},
            "sde.range_start, sde.range_end: [2, 4) with sde.window = 3 and rollout.num_steps = 8; room for",
        ),
        (
            {"sde__window": 3, "sde__place": "random", "sde__range_end": 8},
            "sde.range_start, sde.range_end: [0, 8) with sde.window = 3 and rollout.num_steps = 8; room for",
        ),
        ({"sde__level": 0.0}, "sde.level: 0.0 with sde.kind = flow_grpo; a number above 0 was wanted"),
        ({"sde__kind": "cps", "sde__level": 1.2}, "sde.level: 1.2 with sde.kind = cps; a number above 0, at most 1,"),
        ({"sde__log_prob": "published"}, "sde.log_prob: published with sde.kind = flow_grpo, which is published"),
        (
            {"sde__noise": "region", "explore__alpha_edit": 0.0, "explore__alpha_base": 0.0},
            "sde.noise: region with explore.alpha_edit = explore.alpha_base = 0",
        ),
        ({"sde__stride": 2}, "sde.stride: 2 with sde.window = 0, which does not read it; 1 was wanted"),
        ({"sde__place": "random"}, "sde.place: 'random' with sde.window = 0, which does not read it; 'progressive'"),
        ({"sde__window": 2, "sde__range_end": 4}, "sde.range_end: 4 with sde.place = progressive, which does not"),
        (
            {"sde__window": 2, "sde__place": "random", "sde__interval": 3},
            "sde.interval: 3 with sde.place = random, which does not read it; 25 was wanted",
        ),
        ({"rollout__solver": "heun"}, "rollout.solver: heun with policy = gaussian; euler or dpmpp_2m was wanted"),
        ({"rollout__solver": "dpmpp_2m"}, "rollout.solver: dpmpp_2m with rollout.num_steps = 8 and 7 random steps"),
        (
            {"rollout__solver": "dpmpp_2m", "sde__window": 6},
            "rollout.solver: dpmpp_2m with rollout.num_steps = 8 and 6 random steps",
        ),
        ({"surrogate__anchor_mode": "integrate"}, "surrogate.anchor_mode: 'integrate' with policy = gaussian, which"),
        ({"policy": "neighbour", "sde__level": 0.9}, "sde.level: 0.9 with policy = neighbour, which does not read it"),
        ({"sde__kind": "ddpm"}, "sde.kind: 'ddpm' found; one of flow_grpo, cps, dance was wanted"),
        (
            {"objective__advantage_std": "batch", "objective__quasi_norm": 0.8},
            "objective.advantage_std: batch with objective.quasi_norm = 0.8",
        ),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused(changes, refused):
    (found,) = problems(make(**{"policy": "gaussian"} | changes))
    assert found.startswith(refused)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sde__window": 5, "rollout__solver": "dpmpp_2m"},
        {"sde__window": 7, "sde__place": "random"},
        {"sde__window": 3, "sde__place": "random", "sde__range_end": 3},
        {"sde__kind": "cps", "sde__log_prob": "published", "sde__level": 1.0, "objective__kl_weight": 0.1},
        {"sde__noise": "region", "objective__advantage_std": "batch"},
    ],
)
def test_what_fits_is_not(changes):
    assert problems(make(policy="gaussian", **changes)) == []


def test_a_plan_counts_a_unit_for_each_random_step_and_a_forward_pass_for_the_kl():
    sizes = MMDiTConfig(num_layers=1, num_single_layers=1), VAEConfig()

    def count(**changes: Any) -> dict[str, float]:
        options = small_run.make_options(policy="gaussian", rollout__num_steps=K, acd__weight=0.0, **changes)
        return flops.step(options, *sizes, 16, 64)

    one, window, whole, with_kl = count(sde__window=1), count(**WINDOW), count(), count(objective__kl_weight=0.1)
    assert window["update"] / one["update"] == pytest.approx(2)
    assert whole["update"] / one["update"] == pytest.approx(K - 1)
    assert whole["rollout"] == one["rollout"]
    forwards = whole["rollout"] / K  # of every candidate
    assert with_kl["update"] - whole["update"] == pytest.approx((K - 1) * forwards)


def test_the_page_of_a_run_names_its_random_steps():
    config = small_run.make_config(policy="gaussian", sde__kind="cps", sde__level=0.6, sde__window=2).to_dict()
    said = run_record.facts(run_record.RunRecord(config, [], {}))
    assert said["Random steps"].startswith("cps, level 0.6, independent noise, window 2")
    assert "Surrogate" not in said
