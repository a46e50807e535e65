"""The floors of the house: a module imports from the floors below it, never sideways or up."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "shiftconv"
BELOW = {  # floor: the shiftconv packages that it may import
    "names": set(),
    "files": set(),
    "_version": set(),
    "options": set(),
    "ops": set(),
    "sparse": set(),
    "distill": set(),
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "analysis": {"ops", "nn"},
    "dense": {"ops", "nn", "models", "analysis"},
    "train": {"ops", "nn", "sparse", "distill", "models", "analysis"},
    "deploy": {"ops", "nn", "sparse", "models", "analysis"},
    "recipes": {"ops", "nn", "models", "analysis", "train", "deploy"},
}
GROUND = {"names", "files", "_version"}  # floor 0: every module may import it
FOREIGN = {"ops": {"timm"}, "nn": {"timm"}, "sparse": {"timm"}, "distill": {"timm"}}  # what a floor never imports
ROOF = {"cli", "__main__", "__init__"}  # may import anything below


def imports(path: Path):
    """(line, dotted module) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            if node.module == "shiftconv":
                yield from ((node.lineno, f"shiftconv.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def violations(root: Path):
    for path in sorted(root.rglob("*.py")):
        floor = path.relative_to(root).parts[0].removesuffix(".py")
        for line, module in imports(path):
            top, _, rest = module.partition(".")
            target = rest.split(".")[0]
            if floor in ROOF:
                continue
            if top == "shiftconv" and target != floor and target not in BELOW[floor] | GROUND:
                yield f"{path.relative_to(root)}:{line} ({floor}) imports {module}"
            if top in FOREIGN.get(floor, set()) | {"tests", "benchmarks"}:
                yield f"{path.relative_to(root)}:{line} ({floor}) imports {module}"


def test_every_import_goes_down():
    assert not list(violations(SOURCE))


def test_an_import_that_goes_up_is_found(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "shift.py").write_text("def f():\n    from shiftconv.models import x\nimport timm.layers\n")
    assert len(list(violations(tmp_path))) == 2


def test_files_stay_short():
    long = {str(p.relative_to(SOURCE)): n for p in SOURCE.rglob("*.*") if (n := p.read_bytes().count(b"\n")) > 400}
    assert not long
