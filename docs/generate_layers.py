"""The layers of the code, generated from its imports into docs/architecture.md: python docs/generate_layers.py.

A package may import those of lower layers only. Imports inside functions count; those for type checkers alone do not.
"""

import ast
import collections
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = pathlib.Path(__file__).with_name("architecture.md")
# From the ground up; packages of one layer do not know each other.
LAYERS = (
    ("foundation",),
    ("storage", "parallel", "processing"),
    ("kernels",),
    ("model",),
    ("sam2",),
    ("sa2va",),
    ("checkpoint", "data_pipelines"),
    ("inference", "training"),
    ("batch", "evaluation", "planning"),
    ("bench",),
    ("cli",),
)
DOORS = ("vl3_jax/__init__.py", "vl3_jax/__main__.py", "vl3_jax/sam2/__init__.py")  # lead to everything
_MARKERS = re.compile(r"(?<=<!-- layers -->\n).*(?=<!-- end -->)", re.DOTALL)


def package_of(module: str) -> str | None:
    """Returns the package of a dotted module name: a folder of vl3_jax, its single modules together, or None."""
    top, *rest = module.split(".")
    if top == "data_pipelines":
        return top
    if top != "vl3_jax":
        return None
    return rest[0] if rest and (ROOT / top / rest[0]).is_dir() else "foundation"


def imported_modules(path: pathlib.Path) -> set[str]:
    """Returns the dotted names of the modules and names that a file imports while it runs."""
    found = set()
    nodes = collections.deque([ast.parse(path.read_text(encoding="utf-8"))])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes.extend(ast.iter_child_nodes(node))
    return found


def imports() -> dict[str, set[str]]:
    """Returns the packages that each package imports."""
    edges: dict[str, set[str]] = collections.defaultdict(set)
    for folder in ("vl3_jax", "data_pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            package = package_of(module.removesuffix(".__init__"))
            if path.relative_to(ROOT).as_posix() in DOORS:
                continue
            targets = {package_of(name) for name in imported_modules(path)} - {None, package}
            edges[package] |= targets
    return dict(edges)


def violations() -> list[str]:
    """Returns each import that does not go downwards, and each package that stands in no layer."""
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    edges = imports()
    unknown = [f"{package} stands in no layer" for package in sorted(set(edges) - set(level))]
    return unknown + [
        f"{package} imports {target}"
        for package, targets in sorted(edges.items())
        for target in sorted(targets)
        if package in level and level.get(target, 99) >= level[package]
    ]


def diagram() -> str:
    """Returns the layers and imports as a Mermaid diagram; arrows that follow from others are left out."""
    edges = imports()
    reach: dict[str, set[str]] = {}
    for layer in LAYERS:
        for package in layer:
            direct = edges.get(package, set())
            reach[package] = direct.union(*(reach[target] for target in direct if target in reach))
    lines = ["```mermaid", "flowchart TD"]
    for layer in reversed(LAYERS):
        for package in layer:
            direct = edges.get(package, set())
            implied = set().union(*(reach[target] for target in direct))
            lines += [f"    {package} --> {target}" for target in sorted(direct - implied)]
    return "\n".join([*lines, "```"]) + "\n"


def page() -> str:
    """Returns docs/architecture.md with the diagram of today's imports."""
    return _MARKERS.sub(lambda _: diagram(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print("\n".join(violations()) or "all imports go downwards")
