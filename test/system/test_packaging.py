"""An SPM package holds the whole state tree and all extension modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from support.lab import REPOSITORY


def spm(configuration: Path, *arguments: str) -> str:
    command = [Path(sys.executable).with_name("spm"), "-c", configuration, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_spm_package(tmp_path):
    checkout, configuration = tmp_path / "mailfw", tmp_path / "etc"
    checkout.mkdir()
    configuration.mkdir()
    archive = subprocess.run(["git", "-C", REPOSITORY, "archive", "HEAD"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", checkout], input=archive, check=True)
    paths = {name: str(tmp_path / name) for name in ("formula_path", "pillar_path", "reactor_path", "spm_build_dir")}
    files = {name: str(tmp_path / name) for name in ("spm_db", "spm_logfile", "log_file", "cachedir", "spm_cache_dir")}
    for name in ("spm", "master"):
        (configuration / name).write_text(yaml.safe_dump({"root_dir": str(tmp_path), **paths, **files}))
    spm(configuration, "build", str(checkout))
    (package,) = (tmp_path / "spm_build_dir").glob("mailfw-*.spm")
    spm(configuration, "local", "install", "-y", str(package))
    installed = Path(paths["formula_path"])
    expected = [
        path.relative_to(checkout)
        for top in ("mailfw", "_modules", "_output", "_runners", "_states", "_utils")
        for path in (checkout / top).rglob("*")
        if path.is_file()
    ]
    assert len(expected) > 30
    assert [str(path) for path in expected if not (installed / path).is_file()] == []
