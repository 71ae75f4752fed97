"""Where arrays lie: the mesh, one table from logical axes to mesh axes, and how to apply it.

A weight names its logical axes where it is made (model.py). Only this file knows mesh axes. In
prose a placement is written x[B_(data,fsdp), T_context, D].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codellama_jax import config

MESH_AXES = ("data", "fsdp", "tensor", "context")

AXIS_RULES = {
    # weights
    "layers": None,
    "embed": ("fsdp", "context"),  # a device of the context axis has its tokens, not its weights
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "length": ("context", "tensor"),  # between layers
    "queries": "context",  # inside, where heads, ffn and vocabulary take the tensor axis
}


def make_mesh(layout: config.Layout, devices: list | None = None) -> Mesh:
    """The mesh of `layout` over `devices` (default: all of them).

    Raises ValueError when the sizes of the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [layout.data, layout.fsdp, layout.tensor, layout.context]
    if layout.fsdp == -1:
        others = layout.data * layout.tensor * layout.context
        config.check(
            len(devices) % others == 0,
            f"{len(devices)} devices do not divide by data * tensor * context = {others}",
        )
        sizes[1] = len(devices) // others
    config.check(
        int(np.prod(sizes)) == len(devices),
        f"the mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {np.prod(sizes)} devices, "
        f"there are {len(devices)}; layout.fsdp=-1 takes what is left",
    )
    # Auto: two activation constraints suffice, where Explicit would want one at every product.
    return Mesh(arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def arrange(sizes: list[int], devices: list) -> np.ndarray:
    """The devices as an array of these sizes: what is near in the array is near in the machine.

    Slices of TPUs are joined by a network too slow for anything but `data`, which goes across them.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    config.check(
        sizes[0] % slices == 0,
        f"data={sizes[0]} is not a multiple of the {slices} slices, which only data may cross; "
        f"use layout.data={slices}",
    )
    inside = [sizes[0] // slices, *sizes[1:]]
    return mesh_utils.create_hybrid_device_mesh(
        inside, [slices, 1, 1, 1], devices, allow_split_physical_axes=True
    )


def spec(*axes: str | None) -> P:
    """The placement of an array whose dims have these logical names; None is never split."""
    return P(*(AXIS_RULES[axis] if axis else None for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler where activation `x` lies. Does nothing outside a mesh.

    A dim that its mesh axes do not divide, such as the odd end of a row, stays whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    dims = zip(axes, x.shape, strict=True)
    place = spec(*(axis if axis and size % ways(axis) == 0 else None for axis, size in dims))
    return jax.lax.with_sharding_constraint(x, place)


def platform() -> str:
    """Of the devices that the program being made is for: those for TPUs are made on CPUs, too."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device else jax.default_backend()


def ways(axis: str) -> int:
    """Devices here over which a dim of this logical name is split."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in _axes(AXIS_RULES[axis]))


def is_whole() -> bool:
    """Whether arrays lie on one device here, so that merging axes of theirs moves nothing."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) == 1


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


# -- rows split over the context axis --------------------------------------------------------------
def balance(x: Any, context: int, axis: int = 1) -> Any:
    """A row in the order in which `context` devices take equal shares of it.

    The row is cut into 2 * context slices; device i takes slices i and 2 * context - 1 - i. A query
    sees what is before it, so equal shares in natural order would be unequal work.

        context=2    0 1 2 3 4 5 6 7  ->  0 1 6 7 | 2 3 4 5

    Raises ValueError when the row does not divide.
    """
    check_length(x.shape[axis], context)
    if context == 1:
        return x
    early, late = _cut(x, axis, (2, context))
    pairs = _numpy(x).stack([early, _numpy(x).flip(late, axis)], axis + 1)
    return pairs.reshape(x.shape)


def unbalance(x: Any, context: int, axis: int = 1) -> Any:
    """The inverse of `balance`."""
    check_length(x.shape[axis], context)
    if context == 1:
        return x
    early, late = _cut(x, axis, (context, 2), first=1)
    return _numpy(x).concatenate([early, _numpy(x).flip(late, axis)], axis).reshape(x.shape)


def check_length(length: int, context: int) -> None:
    """Raises ValueError when rows of this length do not divide among the devices."""
    config.check(
        context == 1 or length % (2 * context) == 0,
        f"rows of {length} tokens do not divide into 2 * context = {2 * context} slices; "
        f"use layout.context={math.gcd(length, 2 * context) // 2 or 1}",
    )


def _cut(x, axis, ways, first=0):
    """Early and late slices of x, the slices along `axis`. No gather: its gradient is a scatter."""
    shape = (*x.shape[:axis], *ways, x.shape[axis] // math.prod(ways), *x.shape[axis + 1 :])
    x = x.reshape(shape)
    here = (slice(None),) * (axis + first)
    return x[(*here, 0)], x[(*here, 1)]


def _numpy(x):
    return np if isinstance(x, np.ndarray) else jnp


# -- placing ---------------------------------------------------------------------------------------
def check_divides(shapes: Any, axes: Any, mesh: Mesh) -> None:
    """Raises ValueError when a weight does not divide by the mesh axes it is split over."""

    def check(path, shape, names):
        for size, name in zip(shape.shape, names, strict=True):
            over = [axis for axis in _axes(AXIS_RULES.get(name)) if mesh.shape[axis] > 1]
            ways = math.prod(mesh.shape[axis] for axis in over)
            config.check(
                size % ways == 0,
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} has {size} {name}, "
                f"which {ways} devices of mesh axis {' x '.join(map(repr, over))} do not divide",
            )

    jax.tree_util.tree_map_with_path(check, shapes, axes)


def of_axes(axes: Any, mesh: Mesh) -> Any:
    """A tree of axis-name tuples as a tree of shardings on `mesh`."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp); the row itself stays whole: its length is T + 1."""
    return NamedSharding(mesh, spec("batch"))


def global_batch(host_batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host-local rows [B / processes, ...] as global arrays [B, ...] split over the mesh."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), host_batch)
