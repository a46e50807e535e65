"""The choice of kernels, and a cache that survives whatever happens to it: each case in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shiftconv.ops import backend, native

USE = """
    import logging, torch
    logging.basicConfig(format="LOG %(message)s")
    from shiftconv.ops import backend, shift
    x, offset = torch.arange(12.0).view(1, 1, 3, 4), torch.tensor([[1, -1]])
    for _ in range(2):
        assert shift(x, offset).flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 5, 6, 7, 0]
    print("RAN", backend.explain("shift", "cpu")[0])
"""

needs_compiler = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v c++ || command -v g++"], capture_output=True).returncode != 0,
    reason="no C++ compiler",
)


def start(script=USE, **environment):
    """A fresh process without this one's choices; a variable set to None is removed."""
    changes = {"SHIFTCONV_BACKEND": None, "TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1", **environment}
    kept = {**os.environ, **{k: v for k, v in changes.items() if v is not None}}
    for name in (name for name, value in changes.items() if value is None):
        kept.pop(name, None)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=kept, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(script=USE, **environment):
    process = start(script, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache folder that holds the compiled kernel; copied by the tests that damage it."""
    folder = tmp_path_factory.mktemp("cache")
    code, out, err = run(SHIFTCONV_CACHE=str(folder))
    assert code == 0, err
    assert "backend='native'" in out
    return folder


def copy(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return next(target.glob("*.so"))


@needs_compiler
def test_processes_that_start_together_compile_once(tmp_path):
    counter = tmp_path / "compiler"
    log = tmp_path / "log"
    counter.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) echo x >> {log};; esac\nexec c++ "$@"\n')
    counter.chmod(0o755)
    processes = [start(SHIFTCONV_CACHE=str(tmp_path / "cache"), CXX=str(counter)) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "backend='native'" in out
    assert log.read_text() == "x\n"
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".sha256", ".so"]


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "seal lost"])
def test_damaged_library_is_built_anew(warm, tmp_path, damage):
    library = copy(warm, tmp_path / "cache")
    whole = library.read_bytes()
    if damage == "seal lost":
        library.with_suffix(".sha256").unlink()
    else:
        library.write_bytes({"truncated": whole[:5000], "emptied": b"", "overwritten": b"x" * len(whole)}[damage])
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path / "cache"))
    assert code == 0, err
    assert "backend='native'" in out
    assert native._checksum(library) == library.with_suffix(".sha256").read_text()


@needs_compiler
def test_key_follows_torch_compiler_and_processor(monkeypatch):
    digest = native._digest("shift")
    for module, name, value in (
        (native.torch, "__version__", "9.9"),
        (native, "compiler_version", lambda: "other 1.0"),
        (native, "processor", lambda: ("x86_64", "sse2")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert native._digest("shift") != digest
    assert native._digest("shift") == digest


def test_no_compiler_falls_back_with_one_line(tmp_path):
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), PATH=str(tmp_path), CXX=None)
    assert code == 0, err
    assert "backend='reference'" in out
    assert err.count("LOG") == 1
    assert "LOG shift on cpu runs its slow reference: no C++ compiler (c++, g++, clang++) found; install g++" in err


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_broken_compiler_falls_back_with_one_line(tmp_path, compiler):
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), CXX=compiler)
    assert code == 0, err
    assert "backend='reference'" in out
    assert err.count("LOG") == 1
    assert f"CXX={compiler} is no working C++ compiler" in err


@needs_compiler
def test_refused_compilation_falls_back_and_leaves_nothing(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\necho "x.cpp:1: error: no luck" >&2; exit 1\n')
    broken.chmod(0o755)
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path / "cache"), CXX=str(broken))
    assert code == 0, err
    assert "backend='reference'" in out
    assert err.count("LOG") == 1
    assert "could not compile the shift kernel: x.cpp:1: error: no luck" in err
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@needs_compiler
def test_compiler_that_refuses_march_native_is_asked_without(tmp_path):
    plain = tmp_path / "compiler"
    plain.write_text('#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec c++ "$@"\n')
    plain.chmod(0o755)
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path / "cache"), CXX=str(plain))
    assert code == 0, err
    assert "backend='native'" in out


def test_read_only_home_moves_to_a_private_temporary_folder(tmp_path):
    blocked = tmp_path / "file"  # the superuser could write into a read-only folder, but not into a file
    blocked.write_text("")
    script = "from shiftconv.ops import native; print(native.cache_folder())"
    common = {"SHIFTCONV_CACHE": None, "XDG_CACHE_HOME": None, "TMPDIR": str(tmp_path)}
    for variable in ("HOME", "XDG_CACHE_HOME"):
        code, out, err = run(script, **{**common, variable: str(blocked)})
        assert code == 0, err
        folder = Path(out.strip())
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    code, out, _ = run(script, **{**common, "XDG_CACHE_HOME": str(tmp_path / "xdg")})
    assert Path(out.strip()) == tmp_path / "xdg" / "shiftconv"


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file"])
def test_temporary_folder_of_somebody_else_is_refused(tmp_path, monkeypatch, trap):
    folder = tmp_path / f"shiftconv-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif trap == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(native.NativeError, match="must be a folder of this user with mode 0700"):
        native._private_temporary_folder()


def test_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIFTCONV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(native.NativeError, match="SHIFTCONV_CACHE=.* must be a folder that can be written"):
        native.cache_folder()


def test_forced_reference_compiles_nothing(tmp_path):
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), SHIFTCONV_BACKEND="reference")
    assert code == 0, err
    assert "backend='reference', reason='forced by SHIFTCONV_BACKEND'" in out
    assert "LOG" not in err
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_forced_native(warm):
    code, out, err = run(SHIFTCONV_CACHE=str(warm), SHIFTCONV_BACKEND="native")
    assert code == 0, err
    assert "backend='native', reason='forced" in out


def test_forced_triton_on_the_cpu_interprets(tmp_path):
    pytest.importorskip("triton")
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), SHIFTCONV_BACKEND="triton", TRITON_INTERPRET="1")
    assert code == 0, err
    assert "backend='triton'" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("forced", "environment", "message"),
    [
        ("triton", {}, "SHIFTCONV_BACKEND=triton cannot run shift on cpu: Triton kernels run on cuda"),
        ("native", {"CXX": "false"}, "SHIFTCONV_BACKEND=native cannot run shift on cpu: CXX=false is no working"),
        ("natve", {}, "unknown backend in SHIFTCONV_BACKEND 'natve'; did you mean 'native'?"),
    ],
)
def test_forced_backend_that_cannot_run_is_an_error(tmp_path, forced, environment, message):
    pytest.importorskip("triton")
    code, _, err = run(SHIFTCONV_CACHE=str(tmp_path), SHIFTCONV_BACKEND=forced, **environment)
    assert code == 1
    assert message in err.splitlines()[-1]


def test_import_and_explanation_compile_nothing(tmp_path):
    script = """
        from shiftconv.ops import backend
        choices = backend.explain()
        assert [c[:2] for c in choices if c.op == "shift"] == [("shift", "cpu"), ("shift", "cuda")], choices
        assert all(c.reason for c in choices)
        assert backend.explain("shift", "mps")[0].backend == "reference"
        facts = backend.environment()
        assert all(isinstance(fact, str) and fact for fact in facts.values()), facts
        print(facts["compiled"], "|", facts["cache folder"])
    """
    code, out, err = run(script, SHIFTCONV_CACHE=str(tmp_path))
    assert code == 0, err
    assert out.strip() == f"nothing yet | {tmp_path}"
    assert not list(tmp_path.iterdir())


def test_explains_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("SHIFTCONV_BACKEND", "native")
    assert "C++ kernels run on cpu, not on cuda" in backend.explain("shift", "cuda")[0].reason


def test_unknown_operator():
    with pytest.raises(ValueError, match=r"unknown operator 'shfit'; did you mean 'shift'\?"):
        backend.explain("shfit")
