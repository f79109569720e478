import sys

import pytest

from dvpo.core import backends

# Triton is there for Linux only.
collect_ignore = [] if sys.platform == "linux" else ["test_triton_huber.py"]


@pytest.fixture(params=["compiled", "torch"], scope="module")
def form(request):
    """The critic's loss by one of the forms that a CPU can compute; left alone, a CPU takes the compiled one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "backend", lambda tensor: request.param)
        yield request.param
