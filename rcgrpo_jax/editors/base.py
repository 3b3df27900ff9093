"""The networks of a family of models as training and evaluation use them, and the one way to sample edits from them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, PRNGKeyArray

from rcgrpo_jax.flow import rollout
from rcgrpo_jax.flow.solvers.base import Solver, VelocityWithAux
from rcgrpo_jax.flow.solvers.euler import EULER
from rcgrpo_jax.method import concentration
from rcgrpo_jax.method.sharing import Own


class Masses(NamedTuple):
    """The attention of text tokens on image tokens, of each of the last L_sel blocks (Eq. 16)."""

    inside: Float[Array, "L_sel *b N_txt"]  # in the region
    total: Float[Array, "L_sel *b N_txt"]  # everywhere
    map: Float[Array, "L_sel *b N_img"] | None = None  # a(u), where it is asked for


class Networks(Hashable, Protocol):
    """The networks of a family, without parameters: equal ones share compiled programs.

    Pictures are `[..., H, W, 3]`, their latents `[..., N, C]` on a grid of (rows, columns) tokens. A condition is any
    tree of arrays; what makes one may have any number of networks and passes behind it.
    """

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The token grid of a picture of `height x width` pixels."""

    def sigmas(self, num_steps: int, num_image_tokens: int) -> Float[Array, " K+1"]:
        """The times of a rollout of K steps."""

    def sample_sigma(self, key: PRNGKeyArray, num_image_tokens: int, extra_shift: float) -> Float[Array, ""]:
        """A time of supervised training; a higher `extra_shift` makes it noisier. See `flow.matching.sample_sigmas`."""

    def condition(self, encoded: Mapping[str, Array], guidance: float) -> Any:
        """The condition `c`, of what the editor's `encode` gave: arrays by name, with any leading axes."""

    def source(self, condition: Any) -> Float[Array, "*b N C"]:
        """The latents of the source, on the target's grid."""

    def text_weights(self, encoded: Mapping[str, Array]) -> Float[Array, "*b N_txt"]:
        """1 for the text tokens that are the instruction's own, 0 for padding."""

    def velocity(
        self,
        params: dict,
        lora: dict,
        x: Float[Array, "*b N C"],
        sigma: Float[Array, ""],
        condition: Any,
        grid: tuple[int, int],
        region: Float[Array, "*b N"] | None = None,
        own: Own | None = None,
    ) -> tuple[Float[Array, "*b N C"], Masses | None]:
        """`v_theta(x, sigma, c)`, float32, and the attention masses of the selected blocks where a region is given.

        Where `own` is given, which is only to models whose `Sizes.shares_tokens`, `x` is a group `[G, N, C]` that
        shares all other tokens, condition and region. `G` is then the only leading axis, also of the masses.
        """

    def encode_image(self, params: dict, pictures: Float[Array, "*b H W 3"]) -> Float[Array, "*b N C"]:
        """Latents of pictures in [-1, 1], float32; `params` are those of the editor's `image_params`."""

    def decode(self, params: dict, tokens: Float[Array, "*b N C"], grid: tuple[int, int]) -> Float[Array, "*b H W 3"]:
        """Pictures in [-1, 1], float32; `params` are the editor's `decoder_params`, or its `image_params`."""

    def with_maps(self) -> Networks:
        """These networks, whose masses have their map, over the target's keys alone; `report` draws it.

        Raises:
            UserError: If they give none.
        """


def sample(
    networks: Networks,
    params: dict,
    lora: dict,
    noise: Float[Array, "*b N C"],
    condition: Any,
    sigmas: Float[Array, " K+1"],
    grid: tuple[int, int],
    solver: Solver = EULER,
) -> Float[Array, "K+1 *b N C"]:
    """The states of a rollout from the noise (Eq. 12); the last is the edit's latents.

    Args:
        networks: The networks.
        params: Of the network that predicts velocities.
        lora: Its adapter with the scale folded in (`models.lora.scale_adapter`); empty: none.
        noise: Packed initial noise, float32.
        condition: `c`.
        sigmas: Of `networks.sigmas`.
        grid: The token grid.
        solver: Takes the steps.
    """

    def velocity(x: Array, sigma: Array) -> Array:
        return networks.velocity(params, lora, x, sigma, condition, grid)[0]

    return rollout.integrate(velocity, noise, sigmas, solver)


def velocity_and_density(
    networks: Networks,
    params: dict,
    lora: dict,
    condition: Any,
    grid: tuple[int, int],
    region: Float[Array, " N"],
    text_weights: Float[Array, " N_txt"] | None = None,
    own: Own | None = None,
) -> VelocityWithAux:
    """The velocity of one sample beside the ACD of each selected block (Eq. 17), `[L_sel]`; of a group `[L_sel, G]`.

    Args:
        networks: The networks.
        params: As in `sample`.
        lora: As there.
        condition: Of one sample.
        grid: The token grid.
        region: M.
        text_weights: Text tokens that count, as `concentration.density_from_masses` has them; None: all.
        own: Of a group that shares tokens.
    """

    def velocity(x: Array, sigma: Array) -> tuple[Array, Array]:
        v, masses = networks.velocity(params, lora, x, sigma, condition, grid, region, own)
        return v, concentration.density_from_masses(masses.inside, masses.total, region, text_weights)

    return velocity
