"""Which libraries compute a teacher's answers: a run's files name them, and a resume compares them."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "peft")
"""Packages whose versions may change a model's answers."""


def library_versions() -> dict[str, str]:
    """Return the version of each package that is installed and may change a model's answers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional one
            continue
    return found
