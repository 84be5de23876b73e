"""Copies of the project, to build in."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def copy_of_the_project(folder: Path) -> Path:
    """Copy the project without what was built here; by name, as this may be no git checkout."""
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "*.so", "*_missing.txt", "__pycache__", "*_output"
    )
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored))
