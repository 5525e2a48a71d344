"""Builds the optional C++ kernels; everything else is in pyproject.toml.

One source, `isa.cpp`, is compiled once per instruction set with that set's flags; the best one is chosen at run time.
PyTorch is not needed here. Without a working compiler the package installs all the same and runs on PyTorch's ops.
"""

import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = "surefoot/ops/cpu/csrc"
# NOTE: no contraction or other liberty with floats: results must not depend on how a loop was unrolled.
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-semantic-interposition",
    # Where a hot loop begins within a cache line made a fifth of the delta rule's time.
    "-falign-loops=64",
]
# GCC 12 warns about its own AVX-512 header.
QUIET = ["-Wno-array-bounds", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
VARIANTS = {
    "x86_64": {
        "avx2": ["-DSF_AVX2", *AVX2],
        "avx2_vnni": ["-DSF_AVX2", *AVX2, "-mavxvnni"],
        "avx512": ["-DSF_AVX512", *AVX512],
        "avx512_bf16": ["-DSF_AVX512", *AVX512, "-mavx512bf16"],
    },
    "aarch64": {"neon": ["-DSF_NEON"], "neon_dotprod": ["-DSF_NEON", "-march=armv8.2-a+dotprod"]},
}
ALIASES = {"AMD64": "x86_64", "arm64": "aarch64"}


class BuildKernels(build_ext):
    def build_extension(self, ext):
        machine = platform.machine()
        variants = VARIANTS.get(ALIASES.get(machine, machine), {})
        variants = {name: flags for name, flags in variants.items() if self.accepts(flags)}
        have = [f"-DSF_HAVE_{name.upper()}" for name in variants]
        jobs = [(s, "", have) for s in ("module.cpp", "threads.cpp", "plain.cpp", "isa_select.cpp")]
        jobs += [("isa.cpp", name, [*flags, f"-DSF_ISA={name}"]) for name, flags in variants.items()]
        jobs += [("isa.cpp", "portable", ["-DSF_ISA=portable"])]
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(lambda job: self.compile(ext, *job), jobs))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        libraries = ["dl", "pthread"] if platform.system() == "Linux" else []
        # Beside the old file and then in its place: a process that has it mapped keeps what it mapped.
        fresh = f"{target}.new"
        self.compiler.link_shared_object(
            objects, fresh, libraries=libraries, library_dirs=self.library_dirs, target_lang="c++"
        )
        os.replace(fresh, target)

    def compile(self, ext, source, variant, flags):
        folder = Path(self.build_temp) / (variant or "common")
        return self.compiler.compile(
            [f"{CSRC}/{source}"],
            str(folder),
            include_dirs=self.compiler.include_dirs,
            extra_postargs=COMMON + QUIET + flags,
        )[0]

    def accepts(self, flags):
        """Whether the compiler knows these flags; an old one goes without that instruction set."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("int main() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=flags)
            except Exception:
                return False
            return True


setup(
    ext_modules=[Extension("surefoot.ops.cpu._kernels", [f"{CSRC}/isa.cpp"], language="c++", optional=True)],
    cmdclass={"build_ext": BuildKernels},
    exclude_package_data={"": ["csrc/*"], "surefoot.ops.cpu": ["csrc/*"]},
)
