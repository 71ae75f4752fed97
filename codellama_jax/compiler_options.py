"""What XLA is told beyond its defaults when it compiles a training step, by chip and width.

The options go to `jax.jit(..., compiler_options=...)` of this one program, never into the
environment, so nothing else on the machine is compiled otherwise. tools/check_options.py compares
losses and gradients with and without them; docs/pods.md has what each gave, and what gave nothing.
"""

Options = dict[str, str]

# How much of a chip's vector memory one operation may use; 16 MiB unless told. Matrix products then
# work on larger tiles and read their operands from HBM less often. Chosen by the compiler's cycles
# for the cells of docs/pods.md, jax 0.10.2 and libtpu 0.0.42.1. v4 has only 16 MiB.
VMEM_KIB = "xla_tpu_scoped_vmem_limit_kib"

# Collectives run on the sparse cores, beside what the matrix units do, and not in between. On tpu7x
# that is so by itself, v5e has no such cores, and on v4 these change nothing. The same pair; libtpu
# 0.0.52 takes them too, where it refuses the options that fuse collectives into products.
SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce")
}

OF_CHIP: dict[str, Options] = {
    "v4": {},
    "v5e": {VMEM_KIB: "32768"},  # of narrow models, see OF_WIDE
    "v5p": {VMEM_KIB: "32768", **SPARSE_CORES},
    "v6e": {VMEM_KIB: "114688", **SPARSE_CORES},
    "tpu7x": {VMEM_KIB: "32768"},
}
# 34B on v5e gains another 3%, and takes two to three times as long to compile.
WIDE = 8_192  # of the model, from here on
OF_WIDE: dict[str, Options] = {"v5e": {VMEM_KIB: "65536"}}

KINDS = {  # as JAX names the devices
    "TPU v4": "v4",
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), "v5e"),
    **dict.fromkeys(("TPU v5", "TPU v5p"), "v5p"),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), "v6e"),
    **dict.fromkeys(("TPU7x", "TPU v7x"), "tpu7x"),
}


def of_chip(chip: str, dim: int) -> Options:
    """The options for a chip of chips.CHIPS and a model of this width."""
    return OF_WIDE.get(chip, OF_CHIP[chip]) if dim >= WIDE else OF_CHIP[chip]


def of_device(kind: str, dim: int) -> Options:
    """The options for devices of a kind (`device.device_kind`); none for other than these TPUs."""
    return of_chip(KINDS[kind], dim) if kind in KINDS else {}
