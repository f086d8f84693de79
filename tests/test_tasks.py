"""tasks.py: what it installs, when, and what it passes on."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "tasks.py"


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """tasks.py on a bare copy of the repository, recording its commands instead of running them."""
    spec = importlib.util.spec_from_file_location("tasks", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("ROOT", "VENV", "SCRIPTS", "PYTHON", "STAMP", "REPORT"):
        moved = tmp_path / getattr(module, name).relative_to(FILE.parent)
        monkeypatch.setattr(module, name, moved)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==2\n")
    module.commands, module.failing = [], ""

    def run(command):
        line = " ".join(map(str, command))
        module.commands.append(line)
        if "-m venv" in line:
            module.SCRIPTS.mkdir(parents=True, exist_ok=True)
            module.PYTHON.touch()
        return 7 if module.failing and module.failing in line else 0

    monkeypatch.setattr(module, "run", run)
    return module


def test_setup_makes_the_environment_and_installs_with_constraints(tasks):
    assert tasks.main(["setup"]) == 0
    venv, install = tasks.commands
    assert venv == f"{sys.executable} -m venv {tasks.VENV}"
    assert install == f"{tasks.PYTHON} -m pip install -c constraints.txt -e .[book,faces,test]"


def test_second_setup_does_nothing(tasks):
    tasks.main(["setup"])
    tasks.commands.clear()
    assert tasks.main(["setup"]) == 0
    assert tasks.commands == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(tasks, name):
    tasks.main(["setup"])
    tasks.commands.clear()
    (tasks.ROOT / name).write_text("changed\n")
    tasks.main(["setup"])
    assert any("pip install" in line for line in tasks.commands)


def test_a_build_of_torch_is_installed_first_and_again_when_asked_for(tasks, monkeypatch, tmp_path):
    (tmp_path / "torch.whl").touch()
    monkeypatch.chdir(tmp_path)
    tasks.main(["setup"])
    tasks.commands.clear()
    assert tasks.main(["setup", "--torch", "torch.whl", "torchvision==1+cpu"]) == 0
    first, second = tasks.commands[-2:]
    assert first.endswith(f"install -c constraints.txt {tmp_path / 'torch.whl'} torchvision==1+cpu")
    assert second.endswith("-e .[book,faces,test]")


def test_the_environment_can_name_a_build_of_torch_for_every_installation(tasks, monkeypatch):
    monkeypatch.setenv("MMLIB_TORCH", "torch==1+cpu torchvision==1+cpu")
    tasks.main(["book"])
    assert tasks.commands[1].endswith("install -c constraints.txt torch==1+cpu torchvision==1+cpu")
    tasks.commands.clear()
    tasks.main(["setup"])
    assert tasks.commands == []


def test_a_build_of_torch_that_fails_leaves_no_stamp(tasks):
    tasks.main(["setup"])
    tasks.failing = "torch==1"
    assert tasks.main(["setup", "--torch", "torch==1"]) == 7
    assert tasks.installed() == "" and not tasks.commands[-1].endswith("test]")


def test_line_ends_of_a_checkout_do_not_reinstall(tasks):
    tasks.main(["setup"])
    tasks.commands.clear()
    (tasks.ROOT / "constraints.txt").write_bytes(b"numpy==2\r\n")
    tasks.main(["setup"])
    assert tasks.commands == []


def test_failed_install_is_tried_again(tasks):
    tasks.failing = "pip install"
    assert tasks.main(["setup"]) == 7
    assert not tasks.STAMP.exists()
    tasks.failing = ""
    tasks.commands.clear()
    assert tasks.main(["test"]) == 0
    assert any("pip install" in line for line in tasks.commands)


def test_interrupted_reinstall_leaves_no_stamp(tasks, monkeypatch):
    tasks.main(["setup"])
    (tasks.ROOT / "constraints.txt").write_text("numpy==3\n")
    record = tasks.run

    def interrupted(command):
        if "pip" in command:
            raise KeyboardInterrupt
        return record(command)

    monkeypatch.setattr(tasks, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tasks.main(["setup"])
    assert tasks.installed() == ""


def test_environment_of_another_python_is_made_anew(tasks):
    tasks.main(["setup"])
    tasks.STAMP.write_text("3.9 0123 4567")
    tasks.commands.clear()
    tasks.main(["setup"])
    assert "--clear" in tasks.commands[0]


def test_environment_that_was_copied_or_renamed_with_its_folder_is_made_anew(tasks, monkeypatch):
    tasks.main(["setup"])
    root = tasks.ROOT
    moved = shutil.copytree(root, root.with_name("moved"))
    for name in ("ROOT", "VENV", "SCRIPTS", "PYTHON", "STAMP", "REPORT"):
        monkeypatch.setattr(tasks, name, moved / getattr(tasks, name).relative_to(root))
    tasks.commands.clear()
    assert tasks.main(["book"]) == 0
    venv, install, build = tasks.commands
    assert venv.endswith(f"--clear {moved / '.venv'}") and install.startswith(str(tasks.PYTHON))
    assert build.startswith(str(tasks.PYTHON))  # and no script, which names the folder it was made in


def test_changed_packages_are_installed_into_the_environment_that_is_there(tasks):
    tasks.main(["setup"])
    (tasks.ROOT / "constraints.txt").write_text("numpy==3\n")
    tasks.commands.clear()
    tasks.main(["setup"])
    assert not any("--clear" in line for line in tasks.commands)


def test_check_says_the_first_that_failed_and_runs_all(tasks):
    tasks.failing = "ruff check"
    assert tasks.main(["check"]) == 7
    assert [line.split(" -m ")[1].split()[0] for line in tasks.commands[-3:]] == ["ruff", "ruff", "mypy"]


def test_notebooks_are_written_from_their_texts_and_never_the_other_way(tasks):
    chapters = tasks.ROOT / "book" / "chapters"
    chapters.mkdir(parents=True)
    (chapters / "01_data.md").touch()
    assert tasks.main(["notebooks"]) == 0
    assert tasks.commands[-1].endswith(f"-m jupytext --quiet --update --to ipynb {chapters / '01_data.md'}")


def test_missing_venv_module_is_said(tasks, monkeypatch, capsys):
    def find(name):
        return None if name == "ensurepip" else object()

    monkeypatch.setattr(tasks.importlib.util, "find_spec", find)
    assert tasks.main(["setup"]) == 1
    assert "python3-venv" in capsys.readouterr().err
    assert tasks.commands == []


def test_test_passes_its_arguments_to_pytest(tasks):
    assert tasks.main(["test", "-k", "store", "-x"]) == 0
    assert tasks.commands[-1] == f"{tasks.PYTHON} -m pytest -n auto --dist worksteal -k store -x"
    assert tasks.main(["test", "-n", "0"]) == 0
    assert tasks.commands[-1] == f"{tasks.PYTHON} -m pytest -n 0"


def test_full_passes_its_arguments_on(tasks):
    assert tasks.main(["full", "--minutes", "9"]) == 0
    assert tasks.commands[-1] == f"{tasks.PYTHON} -m benchmarks.gpu --out gpu --minutes 9"


def test_book_says_where_the_report_opens(tasks, capsys):
    assert tasks.main(["book", "--all"]) == 0
    assert tasks.commands[-1].endswith("build book/ --all")
    assert "_build/html/index.html\nfile://" in capsys.readouterr().out


def test_pdf_prints_the_report_with_the_browser_that_is_there(tasks, monkeypatch, capsys):
    monkeypatch.setattr(tasks.shutil, "which", lambda name: "/bin/chrome" if name == "google-chrome" else None)
    assert tasks.main(["pdf"]) == 0
    printed = f"{tasks.PYTHON} book/_ext/print_report.py {tasks.REPORT.parent} {tasks.ROOT / '_build/report.pdf'}"
    assert tasks.commands[-1] == f"{printed} /bin/chrome"
    assert "_build/report.pdf" in capsys.readouterr().out


def test_pdf_without_a_browser_says_so_before_anything_is_built(tasks, monkeypatch, capsys):
    monkeypatch.setattr(tasks.shutil, "which", lambda name: None)
    assert tasks.main(["pdf"]) == 1
    assert "Chromium" in capsys.readouterr().err and tasks.commands == []


def test_failed_book_fails_and_names_no_report(tasks, capsys):
    tasks.failing = "jupyter_book"
    assert tasks.main(["book"]) == 7
    assert "index.html" not in capsys.readouterr().out


def test_clean_removes_the_report_and_nothing_else(tasks):
    tasks.REPORT.parent.mkdir(parents=True)
    assert tasks.main(["clean"]) == 0
    assert sorted(path.name for path in tasks.ROOT.iterdir()) == ["constraints.txt", "pyproject.toml"]


@pytest.mark.parametrize("arguments", [[], ["bok"], ["setup", "now"], ["setup", "--torch"], ["pdf", "now"]])
def test_unknown_task_prints_the_usage(tasks, capsys, arguments):
    assert tasks.main(arguments) == 2
    usage = capsys.readouterr().err
    assert all(f"\n{name} " in usage for name in tasks.TASKS)


def test_commands_run_in_the_repository_from_any_directory(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import tasks; "
        "tasks.run([sys.executable, '-c', 'import os; print(os.getcwd())'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == FILE.parent


def test_old_python_is_refused_in_one_line(tmp_path):
    script = f"import sys; sys.version_info = (3, 9, 0); exec(open({str(FILE)!r}).read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "mmlib needs Python 3.11 or newer; this is Python 3.9\n")
