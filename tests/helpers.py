"""What several test files use."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_code(folder):
    """The scripts and their packages, to be changed there."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for package in ROOT.glob("*/__init__.py"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package.parent, Path(folder, package.parent.name), ignore=ignore)
