"""A platform for verl without an accelerator, where FSDP2 runs over gloo: for tests, loaded by name.

`VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_cpu` with this folder on PYTHONPATH, in the driver and in the workers.
"""

import types
from contextlib import nullcontext

import torch
import torch.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry

_init_process_group = torch.distributed.init_process_group


def _with_gloo(backend=None, **settings):
    """verl asks for one backend of the CPU and one of the device, and torch refuses two of the same device."""
    _init_process_group("gloo", **settings)


torch.distributed.init_process_group = _with_gloo


def _nothing(*arguments, **settings):
    return 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        max_memory_allocated=_nothing,
        max_memory_reserved=_nothing,
        memory_allocated=_nothing,
        memory_reserved=_nothing,
        mem_get_info=lambda *a: (0, 0),
        empty_cache=_nothing,
        synchronize=_nothing,
        set_device=_nothing,
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        is_available=lambda: True,
        get_device_name=lambda: "CPU",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        ipc_collect=_nothing,
    )

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "DVPO_TEST_SLOTS"

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def get_device_capability(self, device_index=0):
        return None, None

    def nvtx_range(self, msg):
        return nullcontext()

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing
