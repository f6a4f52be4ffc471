"""Lets torchvision (and timm, which imports it) be imported beside a torch build it was not compiled for.

The torchvision wheel on PyPI is a CUDA build. Beside a CPU-only torch its extension cannot be loaded, and its import
then fails with "operator torchvision::nms does not exist", although none of the models need that operator.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

# A torch.library.Library takes its definitions with it when it is collected.
_definitions: list[torch.library.Library] = []


def prepare() -> None:
    """Declare the operators that ``import torchvision`` looks up, where its own extension does not provide them.

    Call it before the first import of torchvision or timm. A torchvision that matches torch is left alone.
    """
    if "torchvision" in sys.modules or _definitions or _load_extension():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _definitions.append(library)


def _load_extension() -> bool:
    """Load torchvision's compiled operators; importing torchvision later finds them already loaded."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    libraries = [path for path in Path(spec.origin).parent.glob("_C.*") if path.suffix in (".so", ".pyd")]
    try:
        for path in libraries:
            torch.ops.load_library(str(path))
    except OSError:
        return False
    return bool(libraries)
