"""What users install works: wheel, sdist and editable, far from the checkout, without a network."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("hatchling", reason="packages are built with the extra `test`")
pytest.importorskip("build", reason="packages are built with the extra `test`")

ROOT = Path(__file__).parents[1]
LOOSE = {
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"),
    *("pyproject.toml", ".pre-commit-config.yaml"),
}

# Everything a first user does; the answer is known: rows are their own nearest neighbours.
JOB = """
import sys
import numpy as np
import hnsw_gpu
assert hnsw_gpu.__file__.startswith(sys.argv[1]), hnsw_gpu.__file__
rows = np.random.default_rng(0).normal(size=(300, 20))
index = hnsw_gpu.Index(20, "cosine", "int8", refine=True)
index.add(rows)
index.save("rows.hnsw")
found = hnsw_gpu.load("rows.hnsw").search(rows, 3)
assert found.labels[:, 0].tolist() == list(range(300))
np.save("rows.npy", rows)
print("done")
"""


def call(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(packages, tmp_path_factory) -> Path:
    """The wheel in a folder of its own; the packages it needs are those of the running tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    wheel = only(packages.glob("*.whl"))
    call(*pip, "--no-index", "--no-compile", "--target", folder, wheel, cwd=folder)
    return folder


def only(found):
    (one,) = found
    return one


def names_in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return set(wheel.namelist())


def sources(folder: str) -> set[str]:
    """The files that a checkout has below `folder`, but not what running it leaves behind."""
    found = (ROOT / folder).rglob("*")
    names = [path.relative_to(ROOT).as_posix() for path in found if path.is_file()]
    return {name for name in names if not re.search(r"/\.|/__pycache__/|\.nb[ic]$", name)}


def test_the_wheel_holds_the_package_only(packages):
    names = names_in_wheel(only(packages.glob("*.whl")))
    package = {name for name in names if ".dist-info/" not in name}
    assert package == sources("hnsw_gpu") | {f"hnsw_gpu/{name}" for name in sources("kernels")}
    assert "hnsw_gpu/kernels/search.cu" in package
    assert "hnsw_gpu/py.typed" in package
    about = {name.partition(".dist-info/")[2] for name in names - package}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_sdist_holds_what_is_needed_to_test_it(packages):
    with tarfile.open(only(packages.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    loose = {*LOOSE, ".ci/run"}
    folders = ("hnsw_gpu", "kernels", "tests", "docs", "benchmarks")
    assert loose.union(*map(sources, folders)) <= names
    assert {name.partition("/")[0] for name in names} <= {
        *("hnsw_gpu", "kernels", "tests", "benchmarks", "docs", ".ci", ".gitignore", "PKG-INFO"),
        *LOOSE,
    }


def test_metadata(packages):
    """One version, one licence, and no requirement of the core but the five."""
    wheel = only(packages.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert {
            "hnsw_gpu/deduplication/report_page.html",
            "hnsw_gpu/serve/page.html",
            "hnsw_gpu/files/page_head.html",
        } <= set(archive.namelist())
        name = only(name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name).decode()
    version = re.search('^__version__ = "(.*)"$', (ROOT / "hnsw_gpu/__init__.py").read_text(), re.M)
    assert version is not None
    assert f"\nVersion: {version[1]}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", text, re.M)
    core = {package for package, condition in needs if "extra ==" not in condition}
    assert core == {"click", "numba", "numpy", "tqdm"}
    assert set(re.findall("^Provides-Extra: (.*)$", text, re.M)) == {
        *("bench", "cuda12", "cuda13", "demo", "docs", "io", "langchain", "llama-index", "peers"),
        *("ray", "remote", "serve", "sklearn", "test", "toolkit"),
    }
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_an_environment_has_one_cuda():
    """CuPy takes the newest NVRTC that is there. And what has no wheel has an extra of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, needs in extras.items():
        has_cuda = any(need.startswith(("nvidia-cuda", "cupy")) for need in needs)
        assert has_cuda == (name in ("cuda12", "cuda13", "toolkit"))
        has_source_only = any(need.startswith("hnswlib") for need in needs)
        assert has_source_only == (name == "peers")
        of_others = {need for need in needs if need.startswith("hnsw-gpu[")}
        assert not any("toolkit" in need or "cuda1" in need for need in of_others)


def test_the_wheel_works_and_compiles_once(installed, tmp_path):
    """A second process finds the compiled code on disk: it adds none of its own."""
    cache = tmp_path / "cache"
    paths = {"PYTHONPATH": str(installed), "NUMBA_CACHE_DIR": str(cache)}
    job = [sys.executable, "-W", "error", "-c", JOB, installed]
    assert call(*job, cwd=tmp_path, **paths) == "done\n"
    compiled = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb*")}
    assert compiled
    assert call(*job, cwd=tmp_path, **paths) == "done\n"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb*")} == compiled


UPGRADE_JOB = """
import sys
import numpy as np
import hnsw_gpu
assert hnsw_gpu.__file__.startswith(sys.argv[1]), hnsw_gpu.__file__
found = hnsw_gpu.exact_search(np.float32([[0, 0]]), np.float32([[3, 4]]), 1, "l2")
print(hnsw_gpu.__version__, *found.distances[0])
"""


def test_an_upgrade_answers_with_its_own_code(tmp_path):
    """pip leaves compiled code where it is: a later release must not run that of an earlier one."""
    source = tmp_path / "source"
    for name in ("hnsw_gpu", "kernels"):
        no_builds = shutil.ignore_patterns("__pycache__", "*.nb[ic]")
        shutil.copytree(ROOT / name, source / name, ignore=no_builds)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = tmp_path / "environment"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", where, cwd=tmp_path).strip())
    (site / "needs.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    quiet = {"NUMBA_CACHE_DIR": "", "PYTHONPATH": ""}
    for version, factor in (("0.1.0", 1), ("0.1.1", 2), ("0.1.0", 1)):
        edit(source / "hnsw_gpu/__init__.py", r'(?<=__version__ = )".*"', f'"{version}"')
        edit(
            source / "hnsw_gpu/engine/distance.py",
            r"return .*_squares\(queries",
            f"return np.float32({factor}) * _squares(queries",
        )
        dist = tmp_path / f"{version}-{factor}"
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", dist, source]
        call(*build, cwd=tmp_path)
        upgrade = ["install", "-U", "--force-reinstall", "--no-deps", "--no-index"]
        call(*pip, *upgrade, only(dist.glob("*.whl")), cwd=tmp_path)
        for _ in range(2):
            said = call(python, "-c", UPGRADE_JOB, site, cwd=tmp_path, **quiet)
            assert said.split() == [version, f"{25 * factor}.0"]
    assert list(site.rglob("*.nbc"))


def edit(path: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, path.read_text())
    assert count == 1
    path.write_text(text)


def test_the_installed_command_works(installed, tmp_path):
    command = installed / "bin" / "hnsw-gpu"
    version = call(command, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert version.split()[-1] in only(installed.glob("*.dist-info")).name


def test_the_kernels_are_found_in_the_wheel(installed, tmp_path):
    look = (
        "from hnsw_gpu.gpu import kernel_source as k; print(k.folder()); "
        "assert all(k.source(name) for name in k.REGISTERS_CAP)"
    )
    found = call(sys.executable, "-c", look, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()) == installed / "hnsw_gpu" / "kernels"


def test_an_editable_install_is_the_checkout(tmp_path):
    """The wheel that `pip install -e` makes, unpacked where Python looks for .pth files."""
    code = "import sys, hatchling.build; print(hatchling.build.build_editable(sys.argv[1]))"
    name = call(sys.executable, "-c", code, tmp_path, cwd=ROOT).split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(tmp_path / "site")
    look = (
        "import site, sys; sys.path[:] = [p for p in sys.path if p != sys.argv[2]]; "
        "site.addsitedir(sys.argv[1]); import hnsw_gpu; print(hnsw_gpu.__file__); "
        "from hnsw_gpu.gpu import kernel_source; print(kernel_source.folder())"
    )
    found = call(sys.executable, "-c", look, tmp_path / "site", ROOT, cwd=tmp_path)
    assert found.split() == [str(ROOT / "hnsw_gpu" / "__init__.py"), str(ROOT / "kernels")]
