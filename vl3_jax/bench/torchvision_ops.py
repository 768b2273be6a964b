"""Makes torchvision's Python modules importable beside a build of torch that its compiled library does not match.

torchvision's wheels are compiled against CUDA builds of torch. Beside a CPU build their library does not load, and the
import then fails at operators that are not declared. The reference's processors use only the transforms, which need
none of these operators: declaring their names is enough.
"""

import importlib.util
import pathlib
import re

DECLARATIONS = "_meta_registrations.py"
OPERATOR_NAME = re.compile(r'"torchvision::(\w+)"|register_meta\("(\w+)"')


def declare_operators() -> None:
    """Declares torchvision's operators if its library cannot; does nothing without torchvision or with CUDA."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return
    source = (pathlib.Path(spec.origin).parent / DECLARATIONS).read_text()
    names = {first or second for first, second in OPERATOR_NAME.findall(source)}
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor a) -> Tensor")
