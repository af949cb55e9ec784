"""The device this process computes on: found, never assumed."""

import torch


def find_device() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
