"""Builds rnnkernels._C with CMake and ninja; everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Here, and not above, because a source distribution is made without them.
        import cmake
        import ninja

        program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        # One build directory for every build of this checkout: what has not changed is not compiled again.
        build = ROOT / "build"
        configure = [program, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DRNNKERNELS_PYTHON=ON"]
        subprocess.run(configure, check=True)
        # ninja runs one job per core it may use; CMAKE_BUILD_PARALLEL_LEVEL says otherwise.
        subprocess.run([program, "--build", build, "--target", "_C"], check=True)
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        subprocess.run([program, "--install", build, "--component", "python", "--prefix", prefix], check=True)


setup(ext_modules=[Extension("rnnkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
