"""How near results must be to numbers computed outside, by the dtype they are computed in."""

import pytest
import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def close(actual, expected, dtype=F64):
    expected = torch.as_tensor(expected, dtype=dtype)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
