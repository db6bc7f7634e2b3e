"""What a user installs is whole: the wheel alone has recipes, sources of kernels and types."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    missing = [
        path
        for path in (ROOT / "gearshift").rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not (site / "gearshift" / path.relative_to(ROOT / "gearshift")).exists()
    ]
    assert not missing

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "gearshift", *words]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import gearshift; print(gearshift.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
    shipped = {path.stem for path in (ROOT / "recipes").iterdir()}
    assert shipped == {line.split()[0] for line in said("recipes").splitlines()}
    assert "# Plan:" in said("run", "voice_assistant", "model.name=tiny", "--dry-run")
