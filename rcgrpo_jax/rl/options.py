"""Every field of post-training with its default and unit; `rcgrpo_jax/options.py` has the groups of all trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.options import DataOptions, MeshOptions, ModelOptions, OptimizerOptions, TrainOptions
from rcgrpo_jax.rewards import default_options, factories, is_remote


@dataclass(frozen=True)
class ExploreOptions:
    """How the candidates of a group come to differ."""

    kind: str = "region"  # region: RDP, Eq. 10-11; global: Neighbor GRPO, Eq. 6; mixed: half and half (ours)
    alpha_edit: float = 0.5  # perturbation inside the mask, in [0, 1] (ours; the paper's value is not public)
    alpha_base: float = 0.01  # perturbation outside, in [0, 1] (ours)
    sigma: float = 0.5  # perturbation everywhere for kind=global and mixed, in [0, 1]
    mask_threshold: float = 0.0  # share of a token's pixels that puts it into the region; 0: any pixel (ours)
    mask_dilation: int = 0  # tokens by which the region grows for the perturbation; surrogate and ACD keep the mask


@dataclass(frozen=True)
class RolloutOptions:
    """The candidates of a step."""

    prompts: int = 4  # P, groups in a global batch
    group_size: int = 12  # G, candidates of a group
    num_steps: int = 8  # K, solver steps in training
    solver: str = "euler"  # euler (the paper's), heun (2K - 1 evaluations), dpmpp_2m (K)
    micro_batch: int = 0  # candidates rolled out and scored at a time, as many of each group; 0: all P x G
    decode_micro_batch: int = 0  # of these, images decoded at a time; 0: all
    share: str = "none"  # none, or region: candidates have candidate 0's tokens outside the region, for less (ours)
    share_grow: int = 1  # tokens by which the region grows then
    share_grow_reference: int = 0  # the same on the source image; -1: none of its tokens are a candidate's own
    share_full_steps: int = 0  # the first solver steps, in which nothing is shared


@dataclass(frozen=True)
class SurrogateOptions:
    """How candidates are compared."""

    distance: str = "l2"  # l2 (Eq. 7), region (B.3, form ours), tau (ours), mean
    tau_edit: float = 0.9  # bandwidth inside the mask, of region and tau
    tau_base: float = 1.1  # bandwidth outside
    anchors: int = 4  # B, anchors of a group, from its perturbed candidates: G for kind=global, else G - 1
    anchor_mode: str = "replay"  # replay: one step from the stored state; integrate: the whole path, Eq. 13
    steps: str = "early"  # solver steps that carry the loss: early (the noisier half), all, random
    num_random_steps: int = 4  # how many for steps=random
    weighting: str = "uniform"  # expectation over candidates: uniform (Eq. 5), or policy (under pi_old)
    target_entropy: float = 1.0  # nats, for weighting=policy: the temperature is calibrated to it
    # anchors (replay: anchor-steps, with shared tokens prompt-steps) differentiated at a time over the mesh; 0: all
    micro_batch: int = 0
    share: str = "none"  # none, or region: anchors share candidate 0's tokens, as rollout.share has them (ours)


@dataclass(frozen=True)
class SDEOptions:
    """The random steps of policy=gaussian; those outside of the window are deterministic and teach nothing."""

    kind: str = "flow_grpo"  # how noise enters a step: flow_grpo, cps, dance
    level: float = 0.7  # how much: a of flow_grpo and of cps (1 at most), eta of dance; above 0
    window: int = 0  # w, random steps; 0: all but the last, which never is
    place: str = "progressive"  # where a smaller window is: progressive (MixGRPO), random (Flow-GRPO-Fast)
    interval: int = 25  # training steps after which a progressive window moves
    stride: int = 1  # solver steps that it moves by; 0: it stays at the first ones
    range_start: int = 0  # a random window lies in the steps [start, end), counted from 0
    range_end: int = 0  # 0: K - 1
    noise: str = "independent"  # of candidates: independent, or region: shared outside the mask, as Eq. 10-11 (ours)
    log_prob: str = "density"  # density, or published: Flow-CPS' square error


@dataclass(frozen=True)
class NFTOptions:
    """DiffusionNFT, and CoCoEdit's penalty by region (`method.nft`). Squared distances are of latents, per channel."""

    beta: float = 1.0  # b, how far v+ and v- are from v_old (published: 1 or 0.1, which is faster and less stable)
    time_fraction: float = 0.99  # of a rollout's K times, int(K fraction) of them, drawn for each candidate (published)
    base_weight: float = 1e-4  # of mean (v - v_base)^2, the pull to the model without an adapter (published)
    decay: str = "ramp"  # d of old <- d old + (1 - d) theta: none, ramp or delayed, of method.nft.DECAYS (published)
    keep_weight: float = 0.0  # of the penalty for leaving the background (CoCoEdit: 0.02); 0: none
    keep_to: str = "source"  # what the background is held to: source (CoCoEdit's paper), sample (its code)
    keep_tolerance: float = 1e-3  # squared distance that costs nothing (CoCoEdit)
    change_weight: float = 0.0  # of that on the region of bad samples, which pulls to the source (CoCoEdit: 0.02)
    change_margin: float = 3e-2  # squared distance to the source from which on there is none (CoCoEdit)
    erosion: int = 1  # tokens by which background and region shrink for both (CoCoEdit: 2 cells of 8 pixels, as much)
    ring_weight: float = 0.2  # of the tokens that are in neither then, in [0, 1] (CoCoEdit)


@dataclass(frozen=True)
class ObjectiveOptions:
    """What an update maximises."""

    clip: float = 0.02  # c, half-width of the ratio's clip (ours; peers use 1e-4); the ratio of the first update is 1
    advantage_clip: float = 5.0  # largest |A|
    advantage_std: str = "group"  # whose spread divides: group (Eq. 4), batch (Flow-GRPO)
    quasi_norm: float = 0.0  # p of Neighbor GRPO's advantage (0.8 there); 0: z-score, Eq. 4
    # beta, of the KL to the policy of the rollout, which has no gradient in the first update; gaussian: to the base's.
    kl_weight: float = 0.0
    least_scored: float = 0.5  # share of its candidates that must have all rewards, or else their group teaches nothing
    source_advantage: float = 0.0  # A of candidate G + 1, which keeps the source outside the mask (ours); 0: none
    updates: int = 1  # optimizer updates on one rollout


@dataclass(frozen=True)
class ACDOptions:
    """The reward of attention that stays in the mask (Eq. 16-18)."""

    weight: float = 1.0  # of R_acd after its z-score; 0 turns it off, in the rollout too
    layers: int = 10  # L_sel, the last blocks that count
    reference_keys: bool = False  # count the reference image's keys too
    text: str = "all"  # text tokens that count: all, or instruction (without padding)


@dataclass(frozen=True)
class PostTrainOptions(TrainOptions):
    """The length of a run of post-training, what it writes, and how it is judged while it goes on."""

    samples: str = ""  # held-out examples, as data.path; the first 8 are edited by base and LoRA; empty: none
    sample_every: int = 20  # steps between their edits, from step 0 on
    best: str = ""  # metric whose best checkpoint is kept and marked, such as samples/preservation; empty: none
    patience: int = 0  # times that the samples are edited without a better `best`, after which the run ends; 0: never


@dataclass(frozen=True)
class StepOptions:
    """What the programs of a step are made of, hashable: runs that are equal in it share them."""

    policy: str
    size: tuple[int, int]  # (height, width), pixels
    guidance: float
    lora_scale: float
    explore: ExploreOptions
    rollout: RolloutOptions
    surrogate: SurrogateOptions
    sde: SDEOptions
    nft: NFTOptions
    objective: ObjectiveOptions
    acd: ACDOptions
    optimizer: OptimizerOptions


def _local_reward_options() -> dict[str, dict[str, Any]]:
    """The options of rewards that are computed here, with their defaults."""
    return default_options({name: x for name, x in factories().items() if not is_remote(x)})


@dataclass(frozen=True)
class Options:
    """A run of post-training."""

    seed: int = 0  # of the LoRA, the order of the data, the noise and the anchors
    policy: str = "neighbour"  # how groups explore and are compared: a name of rl.policy.POLICIES
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    explore: ExploreOptions = field(default_factory=ExploreOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    surrogate: SurrogateOptions = field(default_factory=SurrogateOptions)
    sde: SDEOptions = field(default_factory=SDEOptions)
    nft: NFTOptions = field(default_factory=NFTOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    # Reward -> weight after its z-score; 0: not used.
    rewards: Mapping[str, float] = field(default_factory=lambda: {"preservation": 1.0, "colour": 1.0})
    # Reward, or acd -> factor of its weight by the steps done, linear between: "0:1,500:0.2"; not named: 1.
    reward_schedules: Mapping[str, str] = field(default_factory=dict)
    # Name -> MODULE:FUNCTION, a reward of your own from the working directory or what is installed.
    plugins: Mapping[str, str] = field(default_factory=dict)
    watch: str = ""  # rewards that are scored and reported as watch/NAME and never learned from, with commas
    # Reward -> its options, which its class explains. Those of judges are named where one is used.
    reward_options: Mapping[str, Mapping[str, Any]] = field(default_factory=_local_reward_options)
    acd: ACDOptions = field(default_factory=ACDOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: PostTrainOptions = field(default_factory=PostTrainOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)

    @property
    def step(self) -> StepOptions:
        """What the programs of a step are made of."""
        shared = (
            self.explore,
            self.rollout,
            self.surrogate,
            self.sde,
            self.nft,
            self.objective,
            self.acd,
            self.optimizer,
        )
        return StepOptions(self.policy, self.data.size, self.model.guidance, self.lora.scale, *shared)
