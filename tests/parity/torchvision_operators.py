"""Lets torchvision be imported beside a PyTorch that its compiled operators don't fit.

transformers and timm import torchvision where it is installed, and torchvision then registers
properties of its own operators. Built for another PyTorch (one with CUDA, say), it has none.
"""

import torch

# A library that is collected takes its operators with it.
_LIBRARIES: list[torch.library.Library] = []


def define_missing_operators() -> None:
    """Declares the operators, so that the import succeeds; nothing here calls them."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
