"""Commands run by a user id without an entry in /etc/passwd, as in containers (`docker run --user`)."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL

USER = 12345
# The user may read every file, also in folders that are closed to others, such as pytest's, but write none of them.
AS_USER = f"setpriv --reuid={USER} --regid={USER} --clear-groups".split()
AS_USER += "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search".split()
FOLDERS = ("tools", "benchmarks", "segmentation", "detection")


def can_change_user() -> bool:
    if os.name != "posix" or os.getuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*AS_USER, "true"], capture_output=True).returncode == 0


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("segmentation/train.py", "tools/export.py")]
needs_root = pytest.mark.skipif(not can_change_user(), reason="only root can run commands as another user (setpriv)")


def run(script: str, *arguments: object, home: str | None) -> str:
    """Run a script as the user. Require that it prints nothing but its results."""
    path = ROOT / script
    environment = dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1") | ({} if home is None else {"HOME": home})
    command = [*AS_USER, sys.executable, path.name, *map(str, arguments)]
    result = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@needs_root
@pytest.mark.parametrize("home", [pytest.param("/", marks=pytest.mark.slow), None])
def test_a_user_without_a_name_trains_and_predicts(home, few_digits, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, USER, USER)
    arguments = [*SMALL, "--data-path", few_digits, "--output_dir", out / "run", "--device", "cpu"]
    assert "trained in" in run("main.py", *arguments, home=home)
    pictures = ["--out", out / "pictures", "--device", "cpu"]
    run("predict.py", few_digits / "val/0", "--resume", out / "run/checkpoint.pth", *pictures, home=home)
    assert len(list((out / "pictures").iterdir())) == 7


@needs_root
@pytest.mark.parametrize("script", ["detection/test.py", *SLOW])
def test_a_user_without_a_name_gets_help(script):
    assert "usage" in run(script, "--help", home=None)


def test_commands_prepare_the_environment_first():
    """Before they import libraries, which read it then."""
    scripts = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.name != "check_setup.py"]
    commands = [path for path in scripts if 'if __name__ == "__main__"' in path.read_text()]
    assert len(commands) > 10
    for path in [ROOT / "main.py", ROOT / "predict.py", *commands]:
        nodes = sorted(ast.walk(ast.parse(path.read_text())), key=lambda node: getattr(node, "lineno", 0))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.names[0].name if isinstance(node, ast.Import) else str(node.module) for node in imports]
        libraries = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
        assert libraries[0] in ("_repository", "sepvit_lib.common.environment"), path
