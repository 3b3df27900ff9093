"""The paper's equations as pure functions of arrays, one file an idea.

`region` brings the mask to tokens, `explore` builds the neighbourhood of the initial noise (Eq. 6, 10, 11), `surrogate`
the policy over a group (Eq. 7, 13-15), `grpo` the advantages and the objective (Eq. 4, 5), and `concentration` the
attention reward (Eq. 16-18). `gaussian` and `window` have the policy of steps with noise, and which steps those are.
`nft` has the losses of DiffusionNFT and CoCoEdit, which need no policy over a group.
Every function jits and vmaps, and knows neither a model nor a config.

Axes: `P` prompts, `G` candidates of a group, `B` anchors, `K` solver steps, `N` (or `N_img`) image tokens, `N_txt` text
tokens, `C` channels of a token, `H` heads, `D` channels of a head.
"""

from rcgrpo_jax.method import concentration, explore, gaussian, grpo, nft, region, surrogate, window

__all__ = ["concentration", "explore", "gaussian", "grpo", "nft", "region", "surrogate", "window"]
