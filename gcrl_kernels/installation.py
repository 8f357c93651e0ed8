"""Says so where a source tree without compiled kernels is imported: nothing else would show it."""

from __future__ import annotations

import warnings
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent


def warn_if_uncompiled(package: Path = HERE) -> None:
    """Warn if `package` is that of a source tree in which no kernels are compiled."""
    tree = package.parent
    if _is_compiled(package) or not ((tree / "setup.py").exists() and (tree / "csrc").exists()):
        return
    installed = compiled_elsewhere(package)
    advice = "Compile the tree's: pip install -e . (or make setup)."
    if installed is not None:
        advice = (
            f"The installed package in {installed} has compiled ones: start Python outside the "
            "source tree, or as python -P. " + advice
        )
    warnings.warn(
        f"gcrl_kernels is imported from the source tree {tree}, whose kernels are not compiled: "
        f"everything runs on the slow reference, in plain PyTorch. {advice}",
        RuntimeWarning,
        stacklevel=3,
    )


def compiled_elsewhere(package: Path = HERE) -> Path | None:
    """The folder of an installed package with compiled kernels that is not `package`."""
    for distribution in distributions(name="gcrl-kernels"):
        folder = Path(str(distribution.locate_file(package.name))).resolve()
        if folder != package and _is_compiled(folder):
            return folder
    return None


def _is_compiled(package: Path) -> bool:
    return any(package.glob("libgcrl_kernels_*.so"))
