"""How arrays lie on the mesh, as data: a parameter's path gives logical axes, one table turns those into mesh axes."""

from __future__ import annotations

import re

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXIS = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}  # logical axis -> mesh axis

# Path of a parameter -> logical names of its last axes; the first match counts. What is not named is replicated.
PARAMETER_AXES = (
    (r".*/attn/(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj)/kernel", ("embed", "heads")),
    (r".*/attn/(to_out_0|to_add_out)/kernel", ("heads", "embed")),
    (r".*/(net_0/proj|proj_mlp)/kernel", ("embed", "mlp")),
    (r".*/net_2/kernel", ("mlp", "embed")),
    (r"single_transformer_blocks/proj_out/kernel", ("mlp", "embed")),
    (r".*(norm\w*|linear_\d|embedder)(/linear)?/kernel", ("embed", "mlp")),
    (r"encoder/block/.*/(q|k|v|wi_0|wi_1)/kernel", ("embed", "heads")),  # T5
    (r"encoder/block/.*/(o|wo)/kernel", ("heads", "embed")),
    (r"shared/embedding", (None, "embed")),
)


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where a parameter lies; an axis that its mesh axis does not divide stays whole."""
    name = "/".join(path)
    axes = next((axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, name)), ())
    axes = (None,) * (len(shape) - len(axes)) + axes
    mesh_axes = (MESH_AXIS.get(axis) for axis in axes)
    return P(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(mesh_axes, shape, strict=True))
    )


def parameter_sharding(mesh: Mesh):
    """The rule (path, shape) -> sharding that `weights.load` places leaves by."""
    return lambda path, shape: NamedSharding(mesh, parameter_spec(path, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
