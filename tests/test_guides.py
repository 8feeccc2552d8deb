"""What the guides show works as they show it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "adding_a_solver.md"


@pytest.fixture
def followed(tmp_path):
    """A copy of the package and the contract tests in which the guide was followed."""
    for part in ("diffusion_jax", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (promise,) = re.findall(r"^    (\"ralston\": Promise.*)$", GUIDE.read_text(), re.MULTILINE)
    assert len(source.splitlines()) <= 60
    solvers = tmp_path / "diffusion_jax" / "diffusion" / "solvers"
    (solvers / "ralston.py").write_text(source)
    registry = (solvers / "__init__.py").read_text()
    registry = registry.replace("SOLVERS = {", 'from .ralston import Ralston\n\nSOLVERS = {\n    "ralston": Ralston,')
    (solvers / "__init__.py").write_text(registry)
    contracts = tmp_path / "tests" / "contracts" / "test_solvers.py"
    contracts.write_text(contracts.read_text().replace("PROMISES = {", "PROMISES = {\n    " + promise))
    return tmp_path


@pytest.mark.slow
def test_the_solver_of_the_guide_keeps_its_promise(followed):
    """All that is tested of a solver because it is registered, and that --help names it."""
    files = ("tests/contracts/test_solvers.py", "tests/cli/test_bad_input.py")
    chosen = "ralston or every_solver_makes or no_two_solvers or help_names"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, cwd=followed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.count(".") > 50
