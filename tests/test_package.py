"""What a user installs: one wheel without machine code, which carries the sources of the kernels."""

import tomllib
from pathlib import Path
from zipfile import ZipFile

from hatchling.build import build_wheel

import shiftconv

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_pure_python_and_carries_the_kernels(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = build_wheel(str(tmp_path))
    assert name == f"shiftconv-{shiftconv.__version__}-py3-none-any.whl"
    with ZipFile(tmp_path / name) as wheel:
        names = set(wheel.namelist())
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.suffix in (".py", ".cpp", ".h")}
    assert sources <= names
    assert {"shiftconv/ops/csrc/shift.cpp", "shiftconv/ops/triton/shift.py", "shiftconv/py.typed"} <= names
    assert {Path(n).name for n in names if "/licenses/" in n} == {"LICENSE", "NOTICE"}
    assert not [n for n in names if n.endswith((".so", ".pyd", ".dll"))]


def test_what_it_needs_is_what_was_agreed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "torch>=2.11" in project["dependencies"]
    assert project["license"] == "Apache-2.0"
