"""Every job of this repository. ``nox -l`` lists them, ``nox -s demo`` runs one.

Whatever runs our code runs it as a user would get it: wheels, built in isolation from copies of the sources and installed into the
session's environment. ``constraints.txt`` pins what else gets in; torch goes in first, so that nothing else chooses it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

BUILD = Path("build")
CONSTRAINTS = "constraints.txt"
Q_CPU = Path("backends/q-cpu")
Q_TRITON = Path("backends/q-triton")
DISTRIBUTIONS = sorted(path.parent for path in Path().glob("*/q-*/pyproject.toml"))
OTHER_VENDORS = sorted(path.parent for path in Path("integration_tests").glob("*/**/acme-*/pyproject.toml"))
NOT_SOURCES = shutil.ignore_patterns("build", "dist", "tests", "*.egg-info", "*.so", "__pycache__", ".*")

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests", "kernels", "kernels-aot"]
# On a developer's machine an environment is made once; wheels and pins are installed anew each time.
nox.options.reuse_venv = "no" if os.environ.get("CI") else "yes"


@nox.session
def demo(session: nox.Session) -> None:
    """Train, quantize, fine-tune and serve a small model; writes build/demo/report.json."""
    install_wheels(session, "demo")
    output = BUILD.absolute() / "demo"
    session.chdir("integration_tests")
    session.run("python", "-m", "demo", "--output", str(output), *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test against the installed wheels; arguments after ``--`` go to pytest."""
    install_wheels(session, "tests")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, and which package may import which."""
    pip_install(session, "--group", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    native = [str(path) for path in sorted(Path("backends").glob("*/csrc/**/*")) if path.suffix in (".cpp", ".h")]
    session.run("clang-format", "--dry-run", "--Werror", *native)
    sources = os.pathsep.join(str(folder.absolute() / "src") for folder in DISTRIBUTIONS)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})  # it reads the sources and runs nothing


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of every package, strictly."""
    pip_install(session, "torch")
    pip_install(session, "--group", "types", *third_party_requirements())
    session.run("mypy", *(str(folder / "src") for folder in DISTRIBUTIONS), *session.posargs)


@nox.session
def conformance(session: nox.Session) -> None:
    """Test every backend that works on this machine against the surface; arguments after ``--`` go to ``q-core conformance``."""
    install_wheels(session, "conformance")
    session.run("q-core", "conformance", "--backend", "reference", *session.posargs)
    for level in isa_levels(session):
        session.run("q-core", "conformance", "--backend", "q_cpu", *session.posargs, env={"Q_CPU_ISA": level})


@nox.session
def kernels(session: nox.Session) -> None:
    """Test the GPU kernels in Triton's interpreter, through the tiles of each target; arguments after ``--`` go to pytest."""
    install_wheels(session, "kernels")
    folder = Q_TRITON / "tests" / "interpreted"
    suite = folder / "test_conformance.py"
    # Programs are interpreted one after another, however many threads there are.
    whole = ("-k", "not test_thread_count")
    # The families' own tests run once, the whole suite once a vendor; its other architectures differ in tiles, and so at most in values.
    values = (str(suite), "-k", "test_samples or test_agreement or test_layouts or test_non_finite_values")
    runs = {
        "sm_90": (str(folder), *whole),
        **dict.fromkeys(("gfx942", "xe"), (str(suite), *whole)),
        **dict.fromkeys(("sm_80", "gfx1100"), values),
    }
    for target, arguments in runs.items():
        # A thread a worker: programs are interpreted one after another.
        env = {"TRITON_INTERPRET": "1", "Q_TRITON_TARGET": target, "OMP_NUM_THREADS": "1"}
        session.run("pytest", "--numprocesses", "auto", "--dist", "worksteal", *arguments, *session.posargs, env=env)
    # What nox -s gpu runs on one, as far as it can be run here, so that it holds when there is one.
    env = {"TRITON_INTERPRET": "1", "Q_TRITON_TARGET": "sm_90", "OMP_NUM_THREADS": "1", "Q_BACKENDS": "q_cuda,reference"}
    session.run("pytest", "--numprocesses", "auto", "--dist", "worksteal", "-m", "gpu", "integration_tests/gpu", env=env)


@nox.session(name="kernels-aot")
def kernels_aot(session: nox.Session) -> None:
    """Compile the GPU kernels for every target, without one; fails on spills and on unexplained changes; ``-- --update`` explains."""
    install_wheels(session, "kernels")
    session.run("pytest", str(Q_TRITON / "tests" / "compiled"))
    snapshot, report = Q_TRITON / "registers.json", BUILD / "aot" / "report.json"
    session.run("python", "-m", "q_triton.aot", "--snapshot", str(snapshot), "--output", str(report), *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant faults in a vendor's backend, one at a time; the conformance suite must catch each."""
    install_wheels(session, "conformance")
    for folder in OTHER_VENDORS:
        # Its sources are what the faults change.
        session.install("--no-deps", "--force-reinstall", str(wheel(session, folder)))
    session.chdir("integration_tests")
    session.run("python", "-m", "mutants", *session.posargs)


@nox.session(name="bench-dispatch")
def bench_dispatch(session: nox.Session) -> None:
    """Measure what a call costs over its bare kernel, beside bitsandbytes; fails above a target; writes build/bench/dispatch.json."""
    install_wheels(session, "bench")
    session.run("q-core", "bench", "--output", str(BUILD / "bench" / "dispatch.json"), "--check", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure every op and module beside its peers; writes build/bench/cpu.json. With ``-- --pages docs/benchmarks``, pages too.

    ``-- gpu`` measures a GPU instead, and writes build/bench/gpu.json; with ``--page docs/benchmarks/gpu.md``, a page of it.
    """
    install_wheels(session, "bench")
    if session.posargs[:1] == ["gpu"]:
        output = BUILD.absolute() / "bench" / "gpu.json"
        arguments = ["--output", str(output), *session.posargs[1:]]
        session.run("python", "-m", "benchmarks.gpu", *arguments, env={"PYTHONPATH": "integration_tests"})
        return
    output = BUILD.absolute() / "bench" / "cpu.json"
    # Freed memory is kept: else each large output, ours or a peer's, costs more in fresh pages than in computing.
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "PYTHONPATH": "integration_tests"}
    session.run("python", "-m", "benchmarks", "--output", str(output), *session.posargs, env=kept)


@nox.session
def gpu(session: nox.Session) -> None:
    """Show what holds on this machine's GPU: conformance, tests, the demo, the benchmark; writes build/gpu.

    Arguments after ``--`` go to ``python -m gpu``: ``--steps tests:graphs``, ``--backend q_rocm``, ``--device xpu --backend q_xpu``.
    """
    install_wheels(session, "tests")
    output = BUILD.absolute() / "gpu"
    command = ["python", "-m", "gpu", "--installed", "--output", str(output)]
    session.run(*command, *session.posargs, env={"PYTHONPATH": "integration_tests"})


@nox.session
def optimizers(session: nox.Session) -> None:
    """Train at every precision of the states, measure memory and paging; fails where 8 bits lose; writes build/bench/optimizers.json."""
    install_wheels(session, "optimizers")
    output = BUILD.absolute() / "bench" / "optimizers.json"
    session.run("python", "-m", "optimizers", "--output", str(output), *session.posargs, env={"PYTHONPATH": "integration_tests"})


@nox.session
def finetuning(session: nox.Session) -> None:
    """Measure memory of training steps, perplexity and errors; fails where a bound isn't kept; writes build/bench/finetuning.json."""
    install_wheels(session, "finetuning")
    output = BUILD.absolute() / "bench" / "finetuning.json"
    session.run("python", "-m", "finetuning", "--output", str(output), *session.posargs, env={"PYTHONPATH": "integration_tests"})


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run q-cpu's tests, every case of them, on kernels built with the address and undefined-behaviour sanitizers."""
    install_wheels(session, "tests", [folder for folder in DISTRIBUTIONS if folder != Q_CPU])
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
    built = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags}
    sources = str(copy_of_sources(Q_CPU))
    session.install("--no-deps", "--no-cache-dir", "--force-reinstall", "--build-constraint", CONSTRAINTS, sources, env=built)
    # The interpreter isn't built so: the sanitizer must come first, and with it whose exceptions it watches. What Python never frees
    # isn't a leak.
    names = ("libasan.so", "libstdc++.so")
    libraries = (session.run("gcc", f"-print-file-name={name}", external=True, silent=True) for name in names)
    preloaded = " ".join(str(path).strip() for path in libraries)
    watched = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    # The suite comes after, at every ISA level.
    session.run("pytest", "--exhaustive", str(Q_CPU / "tests"), "--ignore-glob=*test_conformance.py", *session.posargs, env=watched)
    for level in isa_levels(session, watched):
        session.run("q-core", "conformance", "--backend", "q_cpu", env={**watched, "Q_CPU_ISA": level})


@nox.session
def aarch64(session: nox.Session) -> None:
    """Compile q-cpu's kernels for aarch64 and compare what they give, emulated, with what they give here."""
    missing = [program for program in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(program) is None]
    if missing:
        session.skip(f"needs {' and '.join(missing)}, of Debian's g++-aarch64-linux-gnu and qemu-user")
    pip_install(session, "pybind11", "setuptools")  # for setup.py, which has the compiler's flags
    session.run("python", ".ci/check_aarch64.py", session.create_tmp())


@nox.session
def huge(session: nox.Session) -> None:
    """Run q-cpu's ops on tensors of more than 2^31 elements, at every ISA level; takes minutes, and 10 GB of memory."""
    install_wheels(session, "tests")
    session.run("pytest", "-m", "huge", str(Q_CPU / "tests"), *session.posargs)


@nox.session
def isolation(session: nox.Session) -> None:
    """Run a model in fresh environments: without a backend, with two, with a broken one, with one for a newer surface."""
    pip_install(session, "torch")
    # What others wrote is installed once and lent to the environments; ours goes into each from its wheels.
    pip_install(session, "--group", "isolation", *third_party_requirements())
    folders = [*DISTRIBUTIONS, *OTHER_VENDORS]
    built = [str(wheel(session, folder).absolute()) for folder in folders]
    session.chdir("integration_tests")
    session.run("python", "-m", "isolation", *built)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, strictly, into build/site; arguments after ``--`` go to mkdocs build."""
    pip_install(session, "torch")
    core = str(wheel(session, Path("packages/q-core")))
    session.run_install("python", "-m", "pip", "uninstall", "--yes", "-qq", "q-core")
    pip_install(session, "--group", "docs", core)
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every sdist, every wheel from its sdist, check what they hold, install all and import them."""
    pip_install(session, "--group", "wheels")
    built = BUILD / "dist"
    shutil.rmtree(built, ignore_errors=True)
    pins = {"PIP_CONSTRAINT": str(Path(CONSTRAINTS).absolute())}
    for folder in DISTRIBUTIONS:
        session.run("python", "-m", "build", "--outdir", str(built), str(copy_of_sources(folder)), silent=True, env=pins)
    files = [str(path) for path in sorted(built.iterdir())]
    session.run("twine", "check", "--strict", *files)
    session.run("python", ".ci/check_distributions.py", *files)

    environment = BUILD.absolute() / "fresh-environment"
    scripts = environment / ("Scripts" if sys.platform == "win32" else "bin")
    python = str(scripts / "python")
    session.run("python", "-m", "venv", "--clear", str(environment))
    for packages in (["torch"], [file for file in files if file.endswith(".whl")]):
        session.run(python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *packages, external=True)
    session.run(python, "-m", "pip", "check", external=True)
    session.chdir(session.create_tmp())
    for folder in DISTRIBUTIONS:
        session.run(python, "-c", f"import {folder.name.replace('-', '_')}", external=True)
    session.run(str(scripts / "q-core"), "doctor", external=True)


# --- installing -------------------------------------------------------------------------------------------------------


def pip_install(session: nox.Session, *arguments: str) -> None:
    """Install within the constraints."""
    session.install("--constraint", CONSTRAINTS, *arguments)


def install_wheels(session: nox.Session, group: str, distributions: list[Path] = DISTRIBUTIONS) -> None:
    """Install torch, then wheels of ours with a dependency group of pyproject.toml."""
    pip_install(session, "torch")
    built = [str(wheel(session, folder)) for folder in distributions]
    # pip takes a wheel of the same version for the same wheel, and would keep the old one.
    session.run_install("python", "-m", "pip", "uninstall", "--yes", "-qq", *(folder.name for folder in DISTRIBUTIONS))
    pip_install(session, "--group", group, *built)


def isa_levels(session: nox.Session, env: dict[str, str] | None = None) -> list[str]:
    """The levels of q-cpu that this machine can run, from the plainest."""
    names = session.run("python", "-c", "from q_cpu.runtime import native; print(*native.available_isas())", silent=True, env=env)
    return str(names).split()


def third_party_requirements() -> list[str]:
    """What our distributions require that is not ours."""
    requirements: set[str] = set()
    for folder in DISTRIBUTIONS:
        requirements.update(nox.project.load_toml(folder / "pyproject.toml")["project"]["dependencies"])
    return sorted(requirement for requirement in requirements if not requirement.startswith("q-"))


# --- building ---------------------------------------------------------------------------------------------------------


def wheel(session: nox.Session, distribution: Path) -> Path:
    """Build a distribution's wheel, unless one of exactly these sources is there already."""
    sources = copy_of_sources(distribution)
    folder = BUILD / "wheels" / f"{distribution.name}-{digest(sources)}"
    if not any(folder.glob("*.whl")):
        for stale in folder.parent.glob(f"{distribution.name}-*"):
            shutil.rmtree(stale)
        session.run(
            "python",
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--build-constraint",
            CONSTRAINTS,
            "--wheel-dir",
            str(folder),
            str(sources),
        )
    (built,) = folder.glob("*.whl")
    return built


def copy_of_sources(distribution: Path) -> Path:
    """Copy what a distribution is built from, so that nothing of an earlier build gets into this one."""
    target = BUILD / "sources" / distribution.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(distribution, target, ignore=NOT_SOURCES)
    return target


def digest(folder: Path) -> str:
    """Digest of a folder's files and of the Python that builds them."""
    sha = hashlib.sha256(sys.version.encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()[:16]
