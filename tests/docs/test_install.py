"""scripts/install.sh finds a Python that fits, or says what is missing; scripts/test.sh goes by the memory there is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "chmod", "cp", "cut", "dirname", "mkdir", "sha256sum")


@pytest.mark.parametrize(
    ("machine", "limits", "files"),
    [
        (24, {}, 3),
        (13, {"memory.max": "max"}, 2),
        (64, {"memory.max": "max"}, 3),
        (64, {"memory.max": 8 * 10**9}, 2),
        (64, {"memory/memory.limit_in_bytes": 9223372036854771712}, 3),
        (64, {"memory/memory.limit_in_bytes": 8 * 10**9}, 2),
    ],
)
def test_how_many_files_are_tested_at_a_time_goes_by_a_containers_memory(tmp_path, machine, limits, files):
    script = (ROOT / "scripts" / "test.sh").read_text()
    lines = "set -euo pipefail\n" + script[script.index("memory=") : script.index("# One thread each")]
    (tmp_path / "meminfo").write_text(f"MemTotal:       {machine}000000 kB\nMemFree:          300 kB\n")
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    lines = lines.replace("/proc", str(tmp_path)).replace("/sys/fs/cgroup", str(tmp_path))
    done = subprocess.run(["bash", "-c", f"{lines} echo $files"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{files}\n"


@pytest.fixture
def install(tmp_path):
    """Sources install.sh in a copy of the checkout, on a machine with certain Pythons and nothing else."""
    checkout, programs = tmp_path / "checkout", tmp_path / "programs"
    (checkout / "scripts").mkdir(parents=True)
    programs.mkdir()
    for name in ("pyproject.toml", "scripts/install.sh", "scripts/demo-requirements.txt"):
        shutil.copy(ROOT / name, checkout / name)
    for name in TOOLS:
        (programs / name).symlink_to(shutil.which(name))

    def install(pythons, **variables):
        for name, version in pythons.items():
            fake_python(programs / name, version)
        done = subprocess.run(
            ["bash", "-c", "source scripts/install.sh && echo $PYTHON"],
            cwd=checkout,
            env={"PATH": str(programs), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, checkout / ".venv"

    return install


def fake_python(path, version):
    """A Python that says it is of another version, makes environments of itself and writes down what pip is to do."""
    answer = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0); "
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!{shutil.which("bash")}\ncase "$1 $2" in\n'
        f"--version*) echo Python {version}.0 ;;\n"
        f"-c*) exec {sys.executable} -c '{answer}'\"$2\" ;;\n"
        '"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;\n'
        '"-m pip") echo "{version} $*" >> pip.log ;;\nesac\n'.replace("{version}", version)
    )
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": "3.11", "python3": "3.11"}, "3.11"),
        ({"python3.12": "3.12", "python3": "3.10"}, "3.12"),
        ({"python3.13": "3.13", "python3.11": "3.11"}, "3.13"),
        ({"python3": "3.12"}, "3.12"),
        ({"python3": "3.14", "python3.11": "3.11"}, "3.11"),
    ],
)
def test_it_takes_the_python_that_fits(install, pythons, chosen):
    done, environment = install(pythons)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{environment}/bin/python\n"
    lines = (environment.parent / "pip.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [chosen, chosen]
    assert lines[0].endswith("-e .[dev]")


@pytest.mark.parametrize("pythons", [{}, {"python3": "3.10"}, {"python3": "3.14", "python3.10": "3.10"}])
def test_without_one_it_says_what_it_needs_and_makes_nothing(install, pythons):
    done, environment = install(pythons)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 with its venv module was found on PATH")
    assert not environment.exists()


def test_an_active_environment_of_another_version_is_named(install, tmp_path):
    fake_python(tmp_path / "active" / "bin" / "python", "3.10")
    done, _ = install({"python3": "3.12"}, VIRTUAL_ENV=str(tmp_path / "active"))
    assert done.returncode == 2
    assert f"{tmp_path}/active holds Python 3.10.0, and xdscale needs Python 3.11, 3.12 or 3.13" in done.stderr
