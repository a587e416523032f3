"""What `pip install .` brings to another repository: the script, trainlib and planning alone.

Why: VJ2-GUI imports the planner and has an `augmentation` package of its own.

    python -m pytest tests/test_packaging.py
"""

import tomllib
import zipfile

import pytest
from conftest import ROOT, python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy of what git would hand out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        hidden = any(part.startswith(".") or part in ("runs", "build") for part in relative.parts)
        if path.suffix in (".py", ".toml", ".json", ".md") and not hidden:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).write_bytes(path.read_bytes())
    build = "import os, setuptools.build_meta as b; os.chdir({!r}); b.build_wheel({!r})"
    done = python("-c", build.format(str(source), str(folder)))
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_script_trainlib_and_planning_alone(wheel):
    listed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {"train_diffusion_ddim.py"}
    for package in ("trainlib", "planning"):
        expected |= {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
    assert listed == expected


def test_an_installed_planner_imports_and_nothing_of_ours_shadows(wheel, tmp_path):
    """In an empty folder, beside an `augmentation` of somebody else."""
    wheel.extractall(tmp_path / "site")
    other = tmp_path / "site" / "augmentation" / "__init__.py"
    other.parent.mkdir()
    other.write_text("raise ImportError('not ours')")
    (tmp_path / "empty").mkdir()
    code = (
        f"import os; os.chdir({str(tmp_path / 'empty')!r})\n"
        "import planning.planner, planning.tasks as tasks\n"
        "from trainlib.errors import UserError\n"
        "print(tasks.make_instances('scroll', 1, 0).task, planning.__file__)\n"
        "try: tasks.draw_gestures(1, None)\n"
        "except UserError as e: print(e)"
    )
    done = python("-c", code, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"scroll {tmp_path / 'site' / 'planning' / '__init__.py'}"
    assert "from a checkout" in second


def test_programs_that_are_not_installed_say_so(wheel, tmp_path, untrained_run):
    """Both in one process, since torch takes seconds to import."""
    wheel.extractall(tmp_path)
    start = (
        f"import os, runpy, sys; os.chdir({str(tmp_path)!r})\n"
        "for program in ('planning', 'planning.goals'):\n"
        f"    sys.argv[1:] = ['--checkpoint', {str(untrained_run)!r}]\n"
        "    sys.argv += ['--output_dir', program + '.out']\n"
        "    try: runpy.run_module(program, None, '__main__')\n"
        "    except SystemExit as stop: print(stop.code)"
    )
    done = python("-W", "ignore::RuntimeWarning", "-c", start, PYTHONPATH=str(tmp_path))
    assert done.stdout == "2\n2\n", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: ") and "run" in line and "from a checkout" in line


def test_dependencies_are_what_the_planner_imports():
    """The trainer's others are extras: it imports them only when it uses them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0] for line in project["dependencies"]}
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert names == {"torch", "numpy"}
    assert names | set(project["optional-dependencies"]["train"]) <= pinned
