"""Where networks run."""

import torch

from karmma_pipeline.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of a recipe; ``auto`` is the first GPU, else the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r}: not available here ({reason}).") from None
    return torch.device(name)
