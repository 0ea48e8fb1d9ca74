"""The C library of the CPU kernels (kernels/c): no Python interface, loaded by ctypes, and optional.

A compiler that is absent or fails does not stop the installation; ``compress.backend()`` then says what serves.
"""

from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_SOURCES = Path("kernels", "c")


class Library(build_ext):
    """A shared library that bears no mark of the Python it was built beside."""

    def get_ext_filename(self, fullname: str) -> str:
        """``compress/kernels/_bitplane.so`` on every platform: nothing but ctypes looks for it."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No module initialisation."""
        return list(ext.export_symbols)

    def build_extension(self, ext: Extension) -> None:
        """Compile all files at once: one of them takes half of the time."""
        compiled = self.compiler.compile
        with ThreadPool() as pool:
            self.compiler.compile = lambda sources, **options: [
                *chain.from_iterable(pool.map(lambda source: compiled([source], **options), sources))
            ]
            super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """One wheel per platform for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "compress.kernels._bitplane",
            sources=sorted(str(path) for path in _SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in _SOURCES.glob("*.h")),
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=fast", "-g0"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": Library, "bdist_wheel": PlatformWheel},
)
