"""Lets torchvision's Python part be imported beside a torch that its compiled part does not fit.

torchvision's wheels are compiled against CUDA builds of torch. Beside a CPU build their library does not load, and the
import then stops at operators nobody has declared. The transforms, which are all that the reference's processors use,
need none of them: declaring the names is enough.
"""

import importlib.util
import pathlib
import re

DECLARATIONS = "_meta_registrations.py"
OPERATOR_NAME = re.compile(r'"torchvision::(\w+)"|register_meta\("(\w+)"')


def declare_operators() -> None:
    """Declares torchvision's operators where its library cannot; does nothing without torchvision or with CUDA."""
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or torch.version.cuda is not None:
        return
    source = (pathlib.Path(found.origin).parent / DECLARATIONS).read_text()
    names = {first or second for first, second in OPERATOR_NAME.findall(source)}
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor a) -> Tensor")
