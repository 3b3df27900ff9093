"""DiffusionNFT and CoCoEdit's penalty: check values, what an update learns from, and what a run keeps and counts."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from flax import struct
from safetensors.numpy import load_file
from scipy import ndimage
from test_seams import Matrix

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.experiments.export import export
from rcgrpo_jax.method import nft
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.plan import flops
from rcgrpo_jax.report import run_record
from rcgrpo_jax.rl import config as schema
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.policy.base import Prompts, Rollout
from rcgrpo_jax.rl.policy.nft import Exploration
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.rl.setup import check_sizes
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.differences import check_same_config
from rcgrpo_jax.runs.saved import saved_config
from rcgrpo_jax.runs.state import TrainState, init_state, new_state

CLIP = 5.0
# The fields of the small run that this policy does not read, at their defaults.
UNREAD = {"surrogate__anchors": 4, "surrogate__distance": "l2", "surrogate__steps": "early"}


class Point(NamedTuple):
    """A sample, its noised state, and velocities there."""

    data: jax.Array
    x: jax.Array
    sigma: float
    v: jax.Array
    v_old: jax.Array


def gaussian_point() -> Point:
    """x_0 ~ N(0.7, 0.4^2) has the velocity v_old; v is moved from it."""
    data, noise, s = jnp.array([[0.1, -0.4, 0.9]]), jnp.array([[-1.3, 0.2, 1.9]]), 0.6
    x = (1 - s) * data + s * noise
    variance = 0.16 * (1 - s) ** 2 + s**2
    v_old = (s - 0.16 * (1 - s)) / variance * (x - 0.7 * (1 - s)) - 0.7
    return Point(data, x, s, v_old + 0.1 * jnp.array([[1.0, -2.0, 3.0]]), v_old)


def random_point(seed: int, shape: tuple[int, int] = (12, 4)) -> Point:
    data, noise, v, v_old = jax.random.normal(jax.random.key(seed), (4, *shape))
    return Point(data, 0.3 * data + 0.7 * noise, 0.7, v, v_old)


def loss(v: jax.Array, point: Point, advantage: float, beta: float) -> jax.Array:
    positive, negative = nft.implied_data(v, point.v_old, point.x, jnp.asarray(point.sigma), beta)
    return nft.matching_loss(positive, negative, point.data, nft.optimality(advantage, CLIP), beta, CLIP)


@pytest.mark.parametrize(("beta", "value", "plain"), [(1.0, 4.13969283, 2.31914902), (0.1, 43.02672446, 21.46586526)])
def test_the_loss_has_the_check_values(beta, value, plain):
    """On the Gaussian at A = 1.5, with the weighting of errors and without it."""
    point = gaussian_point()
    assert loss(point.v, point, 1.5, beta) == pytest.approx(value, rel=2e-6)
    implied = nft.implied_data(point.v, point.v_old, point.x, jnp.asarray(point.sigma), beta)
    good, bad = (jnp.square(x - point.data).mean() for x in implied)
    r = nft.optimality(1.5, CLIP)
    assert CLIP / beta * (r * good + (1 - r) * bad) == pytest.approx(plain, rel=2e-6)


def test_the_gradient_at_the_old_velocity_has_the_check_values():
    point = gaussian_point()
    found = jax.grad(loss)(point.v_old, point, 1.5, 1.0)
    np.testing.assert_allclose(found, [[-0.52380151, -1.27317073, -0.00302775]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("advantage", [-5.0, -0.3, 1.5, 7.0])
def test_the_gradient_at_the_old_velocity_is_the_advantage_times_that_of_matching(beta, advantage):
    point = random_point(0)

    def matching(v):
        return nft.normalised_error(point.x - point.sigma * v, point.data)

    found, wanted = jax.grad(loss)(point.v_old, point, advantage, beta), jax.grad(matching)(point.v_old)
    np.testing.assert_allclose(found, np.clip(advantage, -CLIP, CLIP) * wanted, rtol=2e-5, atol=1e-6)


def test_an_error_of_zero_has_a_gradient():
    """A sample that is matched exactly divides by no zero."""
    data = random_point(0).data
    value, gradient = jax.value_and_grad(nft.normalised_error)(data, data)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_the_old_velocity_gets_no_gradient():
    point = random_point(1)
    gradient = jax.grad(lambda v_old: loss(point.v, point._replace(v_old=v_old), 1.5, 1.0))(point.v_old)
    np.testing.assert_array_equal(gradient, 0)


def test_the_schedules_of_the_old_adapter_are_the_published_ones():
    updates = jnp.array([0, 1, 75, 76, 100, 208, 209, 500, 501, 10_000])
    wanted = {
        "none": [0] * 10,
        "ramp": [0, 0.001, 0.075, 0.076, 0.1, 0.208, 0.209, 0.5, 0.5, 0.5],
        "delayed": [0, 0, 0, 0.0075, 0.1875, 0.9975, 0.999, 0.999, 0.999, 0.999],
    }
    assert wanted.keys() == nft.DECAYS.keys()
    for kind, values in wanted.items():
        np.testing.assert_allclose(nft.decay(kind, updates), values, rtol=1e-6)


def region_of(kind: str) -> np.ndarray:
    """Masks on a grid of 9 x 13 tokens."""
    mask = np.zeros((9, 13), np.float32)
    match kind:
        case "scattered":
            return (np.random.default_rng(3).random(mask.shape) < 0.6).astype(np.float32)
        case "soft":
            mask[2:8, 1:10] = np.random.default_rng(4).random((6, 9))
        case "corner":
            mask[:5, 6:] = 1
    return mask


@pytest.mark.parametrize("kind", ["scattered", "soft", "corner"])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_weights_are_those_of_eroded_masks(kind, radius):
    mask, side = region_of(kind), 2 * radius + 1
    background, edit = (
        ndimage.minimum_filter(x, size=side, mode="constant", cval=1.0) for x in (1 - mask, mask)
    )  # the border of the picture erodes nothing
    if kind != "soft":
        for x, eroded in ((1 - mask, background), (mask, edit)):
            binary = ndimage.binary_erosion(x, np.ones((side, side)), border_value=1)
            np.testing.assert_array_equal(binary, eroded)
    ring = 1 - background - edit
    found = nft.region_weights(jnp.asarray(mask.reshape(-1)), mask.shape, radius, 0.2)
    np.testing.assert_allclose(found[0], (background + 0.2 * ring).reshape(-1), atol=1e-6)
    np.testing.assert_allclose(found[1], (edit + 0.2 * ring).reshape(-1), atol=1e-6)


SETTINGS = {"keep_weight": 0.02, "tolerance": 1e-3, "change_weight": 0.03, "margin": 5.0}


def test_the_penalty_is_that_of_the_weighted_distances():
    rng = np.random.default_rng(5)
    positive, negative, keep, source = rng.standard_normal((4, 9 * 13, 3)).astype(np.float32)
    weights = rng.random((2, 9 * 13)).astype(np.float32)

    def distance(x, y, weight):
        every = np.broadcast_to(weight[:, None], x.shape)
        return (every * (x - y) ** 2).sum() / every.sum()

    wanted = 0.7 * 0.02 * (distance(positive, keep, weights[0]) - 1e-3)
    wanted += 0.3 * 0.03 * (5 - distance(negative, source, weights[1]))
    found = nft.region_penalty(positive, negative, keep, source, tuple(weights), jnp.float32(0.7), **SETTINGS)
    assert found == pytest.approx(wanted, rel=1e-5)
    near = nft.region_penalty(keep, source + 9, keep, source, tuple(weights), jnp.float32(0.7), **SETTINGS)
    assert near == 0  # within the tolerance, and beyond the margin


def test_a_full_mask_has_no_background_to_keep():
    weights = nft.region_weights(jnp.ones(9 * 13), (9, 13), 1, 0.2)
    np.testing.assert_array_equal(weights[0], 0)

    def penalty(positive):
        return nft.region_penalty(positive, *[jnp.ones((9 * 13, 3))] * 3, weights, jnp.float32(1.0), **SETTINGS)

    value, gradient = jax.value_and_grad(penalty)(jnp.zeros((9 * 13, 3)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_the_part_inside_the_mask_moves_the_velocity_towards_the_source():
    """Why it is off by default."""
    point, source = random_point(6), jnp.zeros((12, 4))
    weights = jnp.zeros(12), jnp.ones(12)
    settings = SETTINGS | {"keep_weight": 0.0}

    def penalty(v):
        implied = nft.implied_data(v, point.v_old, point.x, jnp.asarray(point.sigma), 1.0)
        return nft.region_penalty(*implied, source, source, weights, jnp.float32(0.0), **settings)

    moved = point.v_old - jax.grad(penalty)(point.v_old)
    before, after = (jnp.square(point.x - point.sigma * v - source).mean() for v in (point.v_old, moved))
    assert after < before


P, G, K, N, C = 4, 4, 4, 16, 3
T = 3


class Toy(NamedTuple):
    """Programs of the networks of one matrix, and what an update gets."""

    programs: Programs
    params: dict
    state: TrainState
    prompts: Prompts
    exploration: Exploration
    states: jax.Array


@functools.cache
def make_toy(num_devices: int = 1, **changes: Any) -> Toy:
    changes = {
        "lora__rank": 1, "lora__alpha": 1.0, "acd__weight": 0.0, "optimizer__max_grad_norm": 1e9,
        "optimizer__ema_decay": 0.9, "nft__keep_weight": 0.5, "nft__base_weight": 0.01, "nft__time_fraction": 0.99,
    } | changes  # fmt: skip
    options = small_run.make_options(
        policy="nft", rollout__prompts=P, rollout__group_size=G, rollout__num_steps=K, **changes
    )
    mesh = make_mesh({"data": -1}, jax.devices()[:num_devices])
    programs = Programs(options.step, Matrix(), mesh)
    rng = np.random.default_rng(0)
    params = {"W": rng.standard_normal((C, C), np.float32)}
    adapter, old = ({"B": jnp.asarray(0.1 * rng.standard_normal((C, C), np.float32))} for _ in range(2))
    mask = np.zeros((P, 64, 64), np.float32)
    mask[:, 16:48, 16:] = 1  # two rows and three columns of tokens
    with jax.set_mesh(mesh):
        prompts = programs.gather_prompts({"latents": rng.standard_normal((P, N, C), np.float32)}, mask)
        state = new_state(options.optimizer, adapter, jax.random.key(0), keep_old=True).replace(old=old)
        exploration = programs.explore(jax.random.key(0), prompts, state.step)
        states = programs.rollout(params, state.rolling_out, prompts, exploration.candidates).states
    return Toy(programs, params, state, prompts, exploration, states)


ADVANTAGES = np.float32([[1.0, -1.2, 0.0, 0.3], [0.5, 0.5, -1.0, 0.0], [0, 0, 0, 0], [-2.0, 0.1, 0.2, 1.7]])


def update(toy: Toy, advantages: np.ndarray = ADVANTAGES, states: jax.Array | None = None):
    """The state after an update, and its metrics."""
    states = toy.states if states is None else states
    kept = jnp.zeros(toy.programs.policy.kept_shape())
    with jax.set_mesh(toy.programs.mesh):
        rolled = Rollout(states, jnp.zeros((P, G)))
        given = (toy.prompts, toy.exploration, rolled, jnp.asarray(advantages), kept, jnp.asarray(True))
        state, _, metrics = toy.programs.update(toy.params, jax.tree.map(jnp.copy, toy.state), *given)
    return state, metrics


def gradient(state: TrainState) -> jax.Array:
    """Of the first update."""
    return optax.tree.get(state.opt_state, "mu")["B"] / 0.1


def test_each_candidate_is_matched_at_its_own_times_and_noises():
    toy = make_toy()
    times, keys = toy.exploration.times, jax.random.key_data(toy.exploration.keys)
    assert times.shape == keys.shape[:3] == (P, G, T)
    assert set(np.unique(times)) == set(range(K))  # the noise end too, the data never
    assert all(len(set(row)) == T for row in times.reshape(-1, T).tolist())
    assert len({tuple(row) for row in times.reshape(-1, T).tolist()}) > 8
    assert len(np.unique(keys.reshape(P * G * T, -1), axis=0)) == P * G * T


def test_samples_are_those_of_the_old_adapter():
    toy = make_toy()
    x, sigmas = toy.exploration.noise, toy.programs.sigmas
    for now, then in itertools.pairwise(sigmas):
        v = jnp.tanh(x @ (toy.params["W"] + toy.state.old["B"])) * (1 + now) - toy.prompts.condition[:, None]
        x = x + (then - now) * v
    np.testing.assert_allclose(toy.states[:, :, -1], x, rtol=1e-4, atol=1e-5)


def test_an_update_minimises_the_loss_of_all_samples_at_their_times():
    toy = make_toy()
    settings, sigmas = toy.programs.options.nft, toy.programs.sigmas
    eps = jax.vmap(lambda key: jax.random.normal(key, (N, C)))(toy.exploration.keys.reshape(-1))
    eps = eps.reshape(P, G, T, N, C)
    s = sigmas[toy.exploration.times][..., None, None]
    data, source = toy.states[:, :, -1][:, :, None], toy.prompts.condition[:, None, None]
    x = (1 - s) * data + s * eps
    a = ADVANTAGES[:, :, None]
    r = a / 10 + 0.5
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:] = True
    background = ndimage.binary_erosion(~mask, np.ones((3, 3)), border_value=1)
    edit = ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=1)
    weights = np.where(background, 1, np.where(edit, 0, 0.2)).reshape(1, 1, 1, N, 1).astype(np.float32)

    def velocity(B):
        return jnp.tanh(x @ (toy.params["W"] + B)) * (1 + s) - source

    def parts(B):
        v, v_old, v_base = velocity(B), velocity(toy.state.old["B"]), velocity(jnp.zeros((C, C)))
        losses = []
        for u in ((1 - settings.beta) * v_old + settings.beta * v, (1 + settings.beta) * v_old - settings.beta * v):
            error = x - s * u - data
            losses.append(jnp.square(error).mean((-1, -2)) / jax.lax.stop_gradient(jnp.abs(error).mean((-1, -2))))
        positive = x - s * ((1 - settings.beta) * v_old + settings.beta * v)
        distance = (weights * jnp.square(positive - source)).sum((-1, -2)) / (C * weights.sum())
        penalty = r * 0.5 * jnp.maximum(distance - 1e-3, 0)
        from_base = jnp.square(v - v_base).mean((-1, -2))
        total = 5 / settings.beta * (r * losses[0] + (1 - r) * losses[1]) + penalty + 0.01 * from_base
        return jnp.where(a != 0, total, 0).mean(), (jnp.square(v - v_old).mean((-1, -2)), from_base, penalty)

    (wanted, measured), gradients = jax.value_and_grad(parts, has_aux=True)(toy.state.params["B"])
    state, metrics = update(toy)
    assert metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(gradient(state), gradients, rtol=1e-3, atol=1e-5)
    teaches = np.array([0, 1, 3])  # the groups whose metrics count
    for name, values in zip(("from_old", "from_base", "region_penalty"), measured, strict=True):
        assert metrics[name] == pytest.approx(float(values[teaches].mean()), rel=1e-4)
    np.testing.assert_array_equal(state.old["B"], toy.state.old["B"])


def test_what_has_no_advantage_teaches_nothing():
    """Neither a group of equal rewards, whatever it holds, nor a candidate without a score."""
    toy = make_toy()
    state, metrics = update(toy)
    others = toy.states.at[2].set(jnp.nan).at[0, 2].add(3.0).at[1, 3].multiply(-2.0)
    again, same = update(toy, states=others)
    np.testing.assert_array_equal(gradient(state), gradient(again))
    assert metrics["loss"] == same["loss"]
    moved, _ = update(toy, states=toy.states.at[0, 1].add(0.1))
    assert (gradient(moved) != gradient(state)).any()


def test_a_batch_without_advantages_leaves_the_adapter_as_it_was():
    toy = make_toy()
    state, _ = update(toy, np.zeros((P, G), np.float32))
    for found, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(toy.state.params), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert state.num_updates == 0


@pytest.mark.parametrize(
    ("num_devices", "micro_batch"), [(8, 16), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 4), (8, 0)))]
)
def test_losses_are_the_same_for_every_micro_batch_and_mesh(num_devices, micro_batch):
    state, metrics = update(make_toy())
    toy = make_toy(num_devices, surrogate__micro_batch=micro_batch)
    found, measured = update(toy)
    np.testing.assert_array_equal(
        jax.random.key_data(toy.exploration.keys), jax.random.key_data(make_toy().exploration.keys)
    )
    for name in metrics:
        assert measured[name] == pytest.approx(float(metrics[name]), rel=1e-5)
    np.testing.assert_allclose(gradient(found), gradient(state), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("decay", "kept"), [("ramp", 0.003), ("delayed", 0.0)])
def test_the_old_adapter_follows_by_the_updates_so_far(decay, kept):
    toy = make_toy(nft__decay=decay)
    with jax.set_mesh(toy.programs.mesh):
        adam = optax.tree.set(toy.state.opt_state, count=jnp.int32(3))
        refreshed = toy.programs.refresh(jax.tree.map(jnp.copy, toy.state.replace(opt_state=adam)))
    assert refreshed.num_updates == 3
    wanted = kept * toy.state.old["B"] + (1 - kept) * toy.state.params["B"]
    np.testing.assert_allclose(refreshed.old["B"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(refreshed.params["B"], toy.state.params["B"])


@struct.dataclass
class FormerState:
    """The state as it was saved before runs had an old adapter."""

    step: jax.Array
    params: dict
    opt_state: Any
    ema: dict | None
    key: jax.Array


def test_the_old_adapter_is_restored_bit_for_bit_and_former_checkpoints_have_none(tmp_path):
    state = make_toy().state
    with Checkpointer(tmp_path / "new", save_every=1, keep=1) as checkpointer:
        checkpointer.save(1, state, {})
    found = Checkpointer(tmp_path / "new", save_every=1, keep=1).restore(state)
    np.testing.assert_array_equal(found.old["B"], state.old["B"])
    assert (found.old["B"] != found.params["B"]).any()
    former = FormerState(state.step, state.params, state.opt_state, state.ema, state.key)
    with Checkpointer(tmp_path / "former", save_every=1, keep=1) as checkpointer:
        checkpointer.save(1, former, {})
    reader = Checkpointer(tmp_path / "former", save_every=1, keep=1)
    found = reader.restore(state.replace(old=None))
    np.testing.assert_array_equal(found.params["B"], state.params["B"])
    with pytest.raises(UserError, match=r"old\.B is absent in the checkpoint"):
        reader.restore(state)


def test_a_run_of_another_policy_is_not_resumed_with_this_one(tmp_path):
    with Checkpointer(tmp_path, save_every=1, keep=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(1)}, small_run.make_config().to_dict())
    saved = saved_config(Checkpointer(tmp_path, save_every=1, keep=1), schema)
    with pytest.raises(UserError, match='policy: checkpoint "neighbour", config "nft"'):
        check_same_config(saved, small_run.make_config(policy="nft", **UNREAD).to_dict())


def test_a_configuration_from_before_is_that_of_a_run_without_these_fields(tmp_path):
    config = small_run.make_config().to_dict()
    check_same_config({name: x for name, x in config.items() if name != "nft"}, config)


def test_export_reads_the_trained_adapter(tmp_path):
    config = small_run.make_config(policy="nft", **UNREAD)
    options = small_run.make_options(policy="nft", **UNREAD)
    params = open_model(small_run.model_folder()).param_shapes
    state = init_state(options.lora, options.optimizer, 0, params, keep_old=True)
    state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    with Checkpointer(tmp_path / "checkpoints", save_every=1, keep=1) as checkpointer:
        checkpointer.save(1, state, config.to_dict())
    written = load_file(export(tmp_path, tmp_path / "lora", dtype="float32"))
    down = [x for name, x in written.items() if "lora_B" in name]
    assert down
    assert all((x == options.lora.scale).all() for x in down)  # of B = 1; the old one's is 0


def test_a_configuration_is_let_through():
    validate(small_run.make_config(policy="nft", nft__keep_weight=0.02, **UNREAD), 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"nft__beta": 0.0}, "nft.beta: 0.0 found; 0.001 to 100 was wanted"),
        ({"nft__decay": "slow"}, "nft.decay: 'slow' found; one of none, ramp, delayed was wanted"),
        ({"nft__keep_to": "target"}, "nft.keep_to: 'target' found; one of source, sample was wanted"),
        (
            {"nft__time_fraction": 0.2},
            "nft.time_fraction: 0.2 of rollout.num_steps = 4 leaves no time; 1 / 4 or more was wanted",
        ),
        (
            {"rollout__num_steps": 1},
            "nft.time_fraction: 0.99 of rollout.num_steps = 1 leaves no time; 1 / 1 or more was wanted",
        ),
        (
            {"objective__kl_weight": 0.04},
            "objective.kl_weight: 0.04 with policy = nft, which has no likelihood; 0 was wanted, and nft.base_weight "
            "for the pull to the model without an adapter",
        ),
        ({"surrogate__tau_edit": 0.5}, "surrogate.tau_edit: 0.5 with policy = nft, which does not read it"),
        ({"objective__clip": 1e-4}, "objective.clip: 0.0001 with policy = nft, which does not read it"),
        (
            {"objective__source_advantage": 0.5},
            "objective.source_advantage: 0.5 with policy = nft, which does not read it",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, problem):
    with pytest.raises(UsageError) as error:
        validate(small_run.make_config(policy="nft", **UNREAD | changes), 1)
    assert problem in error.value.problem


def test_its_fields_are_refused_for_other_policies():
    with pytest.raises(UsageError, match=r"nft\.beta: 0\.1 with policy = neighbour, which does not read it"):
        validate(small_run.make_config(nft__beta=0.1), 1)


def test_the_page_of_a_run_says_what_it_minimised():
    config = small_run.make_config(policy="nft", nft__beta=0.5, nft__keep_weight=0.02, **UNREAD).to_dict()
    said = run_record.facts(run_record.RunRecord(config, [], {}))
    assert said["Method"] == "DiffusionNFT post-training"
    assert "beta 0.5, 0.99 of the times" in said["Matching"]
    assert "weight 0.02 outside the mask, kept to the source" in said["Penalty by region"]
    assert "Surrogate" not in said


@pytest.mark.parametrize(("base_weight", "beside"), [(1e-4, 2), (0.0, 1)])
def test_the_plan_counts_all_evaluations(base_weight, beside):
    """Of a rollout G K; of an update G T that are differentiated, and the old adapter's and the base's."""
    options = small_run.make_options(policy="nft", nft__base_weight=base_weight, acd__weight=0.0, **UNREAD)
    where = small_run.TINY["transformer"], small_run.TINY["vae"], 16, 16
    one = flops.mmdit(where[0], 16, 16, options.lora, options.acd)
    found = flops.step(options, *where)
    assert found["rollout"] == pytest.approx(2 * 4 * 4 * one.forward)
    differentiated = one.forward + one.recomputed["full"] + one.backward
    assert found["update"] == pytest.approx(2 * 4 * 3 * (differentiated + beside * one.forward))


def test_the_old_adapter_counts_in_memory(monkeypatch):
    """Memory for five adapters holds a policy that keeps none beside the trained one, and its average."""
    model = open_model(small_run.model_folder())
    options, lora = small_run.make_options(optimizer__ema_decay=0.9), small_run.make_options().lora
    state = jax.eval_shape(lambda: init_state(lora, options.optimizer, 0, model.param_shapes))
    adapter = sum(x.size * 4 for x in jax.tree.leaves(state.params))
    monkeypatch.setattr("rcgrpo_jax.borders.memory_bytes", lambda: 5 * adapter)
    monkeypatch.setattr("rcgrpo_jax.rl.setup.check_picture", lambda *_: None)
    monkeypatch.setattr("rcgrpo_jax.rl.setup.candidate_bytes", lambda *_: 0)
    check_sizes(options, model)
    with pytest.raises(UserError, match=r"^lora\.rank"):
        check_sizes(small_run.make_options(policy="nft", optimizer__ema_decay=0.9, **UNREAD), model)
