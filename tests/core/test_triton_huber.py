import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dvpo.core import backends, triton_huber


def test_the_kernel_equals_torch_in_float64_in_tritons_interpreter():
    script = Path(__file__).parent / "interpret_triton.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout)
    assert len(rows) == 5 * 2 * 2
    for row in rows:
        assert max(row["gaps"]) < 3e-7 * 10, row  # float32 results of the order of 1; rewards are at 10,000


def test_where_triton_cannot_launch_torch_computes_and_it_is_said():
    # A CPU is such a place: Triton has no driver for it. On an image without a C compiler it fails as well.
    with pytest.warns(UserWarning, match="Triton does not run here .*: the critic's loss is computed by torch"):
        assert not backends._triton_runs.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability: int, smooth: bool):
    # The interpreter takes programs that the compiler refuses.
    pointers = ("theta_ptr", "atoms_ptr", "levels_ptr", "losses_ptr", "slopes_ptr")
    constants = {"num_heads": 3, "block_m": 256, "depth": 8, "smooth": smooth}
    signature = dict.fromkeys(pointers, "*fp32") | {"kappa": "fp32", "num_quantiles": "i32", "num_atoms": "i32"}
    source = ASTSource(triton_huber._huber_token, signature | dict.fromkeys(constants, "constexpr"), constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
