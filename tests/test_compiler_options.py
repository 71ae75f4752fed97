"""Compiler options: which device gets which, that its compiler knows them, and the tool that
compares what they compute."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from codellama_jax import compiler_options, config
from codellama_jax.plan import chips, program
from recipes import code_llama

SMALLEST = {chip.name: "2x2" if chip.dims == 2 else "2x2x1" for chip in chips.CHIPS.values()}
TOOL = Path(__file__).parents[1] / "tools" / "check_options.py"


def test_every_chip_has_its_options_and_other_devices_have_none():
    assert set(compiler_options.OF_CHIP) == set(chips.CHIPS)
    assert compiler_options.of_device("cpu", 4_096) == {}
    assert compiler_options.of_device("NVIDIA H100 80GB HBM3", 8_192) == {}


@pytest.mark.parametrize("size", ["7b", "34b"])
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_the_compiler_of_a_chip_knows_its_options_and_training_finds_them(chip, size):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install codellama_jax[aot]")
    where = chips.Slice.parse(f"{chip}:{SMALLEST[chip]}")
    device = where.topology()[0]
    options = compiler_options.of_device(device.device_kind, config.SIZES[size].dim)
    assert options == program.told(code_llama.stages(size)["code"], where)
    place = jax.sharding.SingleDeviceSharding(device)
    x_DD = jax.ShapeDtypeStruct((1_024, 1_024), jnp.bfloat16, sharding=place)
    compiled = jax.jit(lambda x_DD: x_DD @ x_DD, compiler_options=options).lower(x_DD).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 1_024**2


def check_options(*args):
    small = ("--dim", "128", "--layers", "1", "--length", "128", "--steps", "2")
    return subprocess.run(
        [sys.executable, TOOL, *small, *args], capture_output=True, text=True, timeout=600
    )


def test_options_that_do_not_exist_are_refused_in_a_sentence():
    done = check_options("--option", "xla_no_such_thing=1")
    assert done.returncode == 2
    assert "xla_no_such_thing" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_options_that_change_nothing_compute_the_same():
    done = check_options("--option", "xla_cpu_enable_fast_math=false")
    assert done.returncode == 0, done.stderr
    assert "weights differ by at most 0.0e+00" in " ".join(done.stdout.split())
