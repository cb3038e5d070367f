"""The package: what is installed, and what an import pulls in."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

_WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
"""


def run_without(absent: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where some modules cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(absent=absent) + code], capture_output=True, text=True, check=False
    )


def test_every_package_is_listed() -> None:
    tops = ("export", "runtime", "plugins", "serving", "tools")
    folders = {path.parent.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")}
    expected = {f"fastvar_trt.{'.'.join(folder.parts)}" for folder in folders}
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == expected
    assert setuptools["package-dir"] == {p: p.removeprefix("fastvar_trt.").replace(".", "/") for p in expected}


EXPORT_ONLY = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")
QUALITY_ONLY = ("matplotlib", "scipy", "sewar", "skimage")
SERVE_ONLY = ("fastapi", "limits", "prometheus_client", "ray", "uvicorn")


def test_the_runtime_draws_without_torch_and_onnx(tiny_bundle: Path) -> None:
    code = f"""
from fastvar_trt.runtime import Pipeline
with Pipeline.load({str(tiny_bundle)!r}) as pipe:
    print(pipe.generate([1]).images.shape)
assert not [m for m in sys.modules if m.startswith("fastvar_trt.export") or m.startswith("fastvar_trt.tools")]
"""
    done = run_without((*EXPORT_ONLY, "click", "PIL"), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 128, 128, 3)"


def test_importing_the_runtime_loads_no_backend() -> None:
    done = run_without(EXPORT_ONLY, "import fastvar_trt.runtime\nassert 'onnxruntime' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["cli", "cli.export"])
def test_help_needs_only_what_the_runtime_needs(command: str) -> None:
    code = f"from fastvar_trt.tools.{command} import main\nmain(['--help'])"
    done = run_without((*EXPORT_ONLY, *QUALITY_ONLY, *SERVE_ONLY, "onnxruntime"), code)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("command", "arguments", "absent", "extras"),
    [
        ("cli.export", ["scenes", "--out", "unused"], EXPORT_ONLY, "export,cpu"),
        ("cli", ["build", "unused", "--target", "cpu"], EXPORT_ONLY, "export,cpu"),
        ("cli", ["compare", "a", "b"], QUALITY_ONLY, "quality"),
        ("cli", ["tune", "a", "--out", "unused"], ("matplotlib",), "export,cpu,quality"),
        ("cli", ["serve", "a"], SERVE_ONLY, "serve"),
    ],
)
def test_a_missing_extra_is_named(command: str, arguments: list[str], absent: tuple[str, ...], extras: str) -> None:
    done = run_without(absent, f"from fastvar_trt.tools.{command} import main\nmain({arguments!r})")
    assert done.returncode == 1
    assert f" is not installed; pip install 'fastvar-trt[{extras}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_onnxruntime_is_named(tiny_bundle: Path) -> None:
    code = f"from fastvar_trt.tools.cli import main\nmain(['verify', {str(tiny_bundle)!r}])"
    done = run_without(("onnxruntime",), code)
    assert done.returncode == 1
    assert "onnxruntime is not installed; install one of the extras" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_installed_needs_no_clone(tmp_path: Path) -> None:
    """The source distribution, a wheel made of it, and that in a fresh environment: the demo's model draws."""
    source, home = tmp_path / "source", tmp_path / "home"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,), (_,) = (list((tmp_path / "dist").glob(f"*{kind}")) for kind in (".whl", ".tar.gz"))
    assert wheel.name.startswith(f"fastvar_trt-{PROJECT['project']['version']}-")
    shutil.rmtree(source)
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # the packages that it needs, but not ours
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    bundle, picture = tmp_path / "bundle", tmp_path / "picture.png"
    export = ["scenes", "--pn", "0.06M", "--prune", "none", "--no-compare", "--out", str(bundle)]
    page = (
        "import fastvar_trt.serving.http.app as a; a.resources.files(a.__package__).joinpath('page.html').read_text()"
    )
    for command, arguments in (
        ("python", ["-c", f"import fastvar_trt.runtime as r; assert r.__file__.startswith({str(site)!r})"]),
        ("fastvar-export", export),
        ("fastvar", ["generate", str(bundle), "--prompt", "a red sphere on sand", "-o", str(picture)]),
        ("fastvar", ["doctor"]),
        ("python", ["-c", page]),
    ):
        found = subprocess.run([home / "bin" / command, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
