"""The choice of kernels, and a cache that survives whatever happens to it: each case in a process of its own."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from shiftconv.ops import backend, native

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

USE = """
    import logging, torch
    logging.basicConfig(format="LOG %(message)s")
    from shiftconv.ops import backend, shift
    x, offset = torch.arange(12.0).view(1, 1, 3, 4), torch.tensor([[1, -1]])
    for _ in range(2):
        assert shift(x, offset).flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 5, 6, 7, 0]
    print("RAN", backend.explain("shift", "cpu")[0])
"""


def run(script=USE, **environment):
    """A fresh process without this one's choices; a variable given as None is removed."""
    changes = {"SHIFTCONV_BACKEND": None, "TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1", **environment}
    merged = {**os.environ, **changes}
    kept = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=kept, text=True, capture_output=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """An operator named demo whose source is nearly empty, a compiler that counts its calls, an empty cache."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "demo.cpp").write_text('extern "C" int demo() { return 1; }\n')
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("SHIFTCONV_CACHE", str(tmp_path / "cache"))
    use_compiler(tmp_path, monkeypatch, 'exec c++ "$@"')
    yield tmp_path
    forget()


def use_compiler(folder, monkeypatch, body):
    """Let CXX be a script; it notes every compilation in the file named log."""
    script = folder / "compiler"
    note = f'case "$*" in *.cpp*) echo "$$" >> {folder}/log;; esac'
    script.write_text(f"#!/bin/sh\n{note}\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    forget()


def forget():
    for cached in (native.compiler, native.compiler_version, native.library):
        cached.cache_clear()


def compilations(folder):
    return len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0


def left_in_cache(folder):
    return sorted(path.suffix for path in (folder / "cache").iterdir())


@needs_compiler
@needs_fork
def test_processes_that_start_together_compile_once(demo):
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                native.load("demo")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert compilations(demo) == 1
    assert left_in_cache(demo) == [".lock", ".sha256", ".so"]


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "seal lost", "nothing"])
def test_damaged_library_is_built_anew(demo, damage):
    library = native.build("demo")
    whole = library.read_bytes()
    if damage == "seal lost":
        library.with_suffix(".sha256").unlink()
    elif damage != "nothing":
        library.write_bytes({"truncated": whole[:5000], "emptied": b"", "overwritten": b"x" * len(whole)}[damage])
    assert native.is_built("demo") == (damage == "nothing")
    native.load("demo")
    assert native.is_built("demo")
    assert compilations(demo) == 1 + (damage != "nothing")


@needs_compiler
def test_key_follows_source_torch_compiler_and_processor(demo, monkeypatch):
    digest = native._digest("demo")
    for module, name, value in (
        (native.torch, "__version__", "9.9"),
        (native, "compiler_version", lambda: "other 1.0"),
        (native, "processor", lambda: ("x86_64", "sse2")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert native._digest("demo") != digest
    assert native._digest("demo") == digest
    header, source = demo / "csrc" / "helper.h", demo / "csrc" / "demo.cpp"
    header.write_text("// new\n")
    assert native._digest("demo") == digest  # nobody includes it
    source.write_text('#include "helper.h"\n' + source.read_text())
    including = native._digest("demo")
    header.write_text("// newer\n")
    assert len({digest, including, native._digest("demo")}) == 3


@needs_compiler
def test_refused_compilation_says_why_and_leaves_nothing(demo, monkeypatch):
    refuse = '[ "$1" = --version ] && exec c++ --version\necho "x.cpp:1: error: no luck" >&2; exit 1'
    use_compiler(demo, monkeypatch, refuse)
    with pytest.raises(native.NativeError, match=r"could not compile the demo kernel: x.cpp:1: error: no luck"):
        native.load("demo")
    assert left_in_cache(demo) == [".lock"]


@needs_compiler
def test_compiler_that_refuses_march_native_is_asked_without(demo, monkeypatch):
    use_compiler(demo, monkeypatch, 'case "$*" in *-march=native*) exit 1;; esac\nexec c++ "$@"')
    native.load("demo")
    assert compilations(demo) == 2


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_broken_compiler(demo, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    forget()
    with pytest.raises(native.NativeError, match=f"CXX={compiler} is no working C.. compiler; install"):
        native.load("demo")


def test_no_compiler_falls_back_with_one_line(tmp_path):
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), PATH=str(tmp_path), CXX=None)
    assert code == 0, err
    assert "backend='reference'" in out
    assert err.count("LOG") == 1
    assert "LOG shift on cpu runs its slow reference: no C++ compiler (c++, g++, clang++) found; install g++" in err


@needs_compiler
def test_failed_compilation_is_not_tried_at_every_call(demo, monkeypatch, caplog):
    use_compiler(demo, monkeypatch, '[ "$1" = --version ] && exec c++ --version\nexit 1')
    monkeypatch.delenv("SHIFTCONV_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_obstacles", {})
    for _ in range(3):
        assert backend.kernel("demo", "cpu", reference=len) is len
    assert compilations(demo) == 2  # with -march=native and without
    assert len([record for record in caplog.records if "demo on cpu runs its slow reference" in record.message]) == 1


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_read_only_home_moves_to_a_private_temporary_folder(tmp_path, monkeypatch, variable):
    blocked = tmp_path / "file"  # the superuser could write into a read-only folder, but not into a file
    blocked.write_text("")
    for name in ("SHIFTCONV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(blocked))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = native.cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert native.cache_folder() == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "xdg" / "shiftconv"


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
    with pytest.raises(native.NativeError, match=r"SHIFTCONV_CACHE=.* must be a folder that can be written"):
        native.cache_folder()


def test_forced_reference_compiles_nothing(tmp_path):
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), SHIFTCONV_BACKEND="reference")
    assert code == 0, err
    assert "backend='reference', reason='forced by SHIFTCONV_BACKEND'" in out
    assert "LOG" not in err
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_native_kernel_is_taken_and_explained():
    code, out, err = run()
    assert code == 0, err
    assert "backend='native', reason='C++ kernel, " in out
    assert "LOG" not in err


def test_forced_triton_on_the_cpu_interprets(tmp_path):
    pytest.importorskip("triton")
    code, out, err = run(SHIFTCONV_CACHE=str(tmp_path), SHIFTCONV_BACKEND="triton", TRITON_INTERPRET="1")
    assert code == 0, err
    assert "backend='triton'" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("forced", "device", "message"),
    [
        ("triton", "cpu", "SHIFTCONV_BACKEND=triton cannot run demo on cpu: .*[tT]riton"),
        ("native", "cuda", "SHIFTCONV_BACKEND=native cannot run demo on cuda: C.. kernels run on cpu, not on cuda"),
        ("native", "cpu", "SHIFTCONV_BACKEND=native cannot run demo on cpu: CXX=false is no working"),
        ("natve", "cpu", "unknown backend in SHIFTCONV_BACKEND 'natve'; did you mean 'native'"),
    ],
)
def test_forced_backend_that_cannot_run_is_an_error(demo, monkeypatch, forced, device, message):
    monkeypatch.setenv("SHIFTCONV_BACKEND", forced)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    with pytest.raises((RuntimeError, ValueError), match=message):
        backend.kernel("demo", device, reference=len)


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
