"""Selection of the device."""

import platform

import torch

from karmma_pipeline.errors import ConfigError, counted, one_line


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of a recipe; ``auto`` is a GPU if there is one, else the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        local_rank: number of this process among those on this machine; ``auto`` and ``cuda``
            give each its own GPU.

    Raises:
        ConfigError: the device is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and not gpus:
        return torch.device("cpu")
    if name in {"auto", "cuda"} and gpus:
        if local_rank >= gpus:
            raise ConfigError(
                f"device={name!r}: at least {local_rank + 1} processes for {counted(gpus, 'GPU')}; "
                f"start torchrun with --nproc-per-node {gpus}."
            )
        return torch.device("cuda", local_rank)
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it cannot run computations")
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error, 150)
        raise ConfigError(f"device={name!r}: not available here ({reason}).") from None
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return what a person calls a device, such as ``NVIDIA H100`` or ``Intel Xeon``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())
