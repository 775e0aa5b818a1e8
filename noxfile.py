"""What a release is held to: wheels that build under isolation, hold no torch, and work beside several torch and Python versions.

`nox` does all of it and wants gigabytes and a quarter of an hour; `nox -s sdist wheel-3.12 installed-3.12` does one Python's part. Without
nvcc, or with RNNKERNELS_CUDA=0 in the environment, the wheels have no CUDA part.
"""

import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
# The oldest torch that pyproject.toml admits, the one that is developed against, and the newest; each Python that it admits.
TORCH = {"3.10": "2.5.1", "3.11": "2.13.0", "3.12": "2.14.1", "3.13": "2.13.0"}
# Tests of the numbers, of torch's own samples and of what torch's versions differ in; they need no other part of this checkout.
TESTS = ["test_parity.py", "test_module_db.py", "test_modules.py", "test_ops.py"]
nox.options.default_venv_backend = "venv"


def only(pattern: str) -> Path:
    (found,) = (ROOT / "dist").glob(pattern)
    return found


@nox.session
def sdist(session: nox.Session) -> None:
    """The source distribution: all that the build needs, and nothing that was built. It is unpacked for the wheels."""
    for folder in ("dist", "build/sdist"):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--sdist")
    with tarfile.open(only("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(ROOT / "build" / "sdist")
    wanted = {str(path.relative_to(ROOT)) for folder in ("csrc", "rnnkernels") for path in (ROOT / folder).rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name and not name.endswith(".so") and "rnnkernels/include/" not in name}
    assert wanted <= names, f"not in the sdist: {sorted(wanted - names)}"
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@nox.session(python=list(TORCH))
def wheel(session: nox.Session) -> None:
    """A wheel of the source distribution: no file but ours, no library but the compiler's and torch's OpenMP."""
    session.install("build")
    # One place for all Pythons: what they share, all but one file, is compiled once.
    (source,) = (ROOT / "build" / "sdist").iterdir()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(ROOT / "dist"), str(source))
    tag = "cp" + str(session.python).replace(".", "")
    with zipfile.ZipFile(only(f"*-{tag}-*.whl")) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
        module = archive.extract(next(name for name in names if name.endswith(".so")), session.create_tmp())
    strangers = [name for name in names if not name.startswith(("rnnkernels/", "rnnkernels-"))]
    assert not strangers, f"not ours: {strangers}"
    assert len([name for name in names if ".so" in name]) == 1
    assert "Requires-Dist: torch>=2.5" in metadata
    needed = str(session.run("readelf", "-d", module, external=True, silent=True))
    assert "torch" not in needed, needed
    assert "libc10" not in needed, needed


@nox.session(python=list(TORCH))
def installed(session: nox.Session) -> None:
    """The wheel in a clean environment: its tests, a cell compiled against its headers, what `info` says, how long it takes to import."""
    tag = "cp" + str(session.python).replace(".", "")
    session.install(f"torch=={TORCH[str(session.python)]}", "numpy")
    session.install("--no-deps", str(only(f"*-{tag}-*.whl")))
    session.chdir(session.create_tmp())
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", "rnnkernels", "info")
    session.run("python", str(ROOT / "bench" / "import_time.py"))
    session.install("pytest", "pytest-xdist", "hypothesis", "expecttest")
    shutil.rmtree("tests", ignore_errors=True)
    shutil.copytree(ROOT / "tests", "tests")
    shutil.copytree(ROOT / "examples", "examples", dirs_exist_ok=True)
    session.run("python", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", "-n", "2", *(f"tests/{name}" for name in TESTS))
    session.run("python", "-c", "import rnnkernels; print(rnnkernels.load_cell('examples/leaky.h'))")
