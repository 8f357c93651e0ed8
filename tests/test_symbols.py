"""What the objects of a build define: of two weak definitions of a name a linker keeps one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

# Type and name of what an object defines for others: weak functions and data, unique ones.
DEFINED = re.compile(r"^[0-9a-f]+ [WVu] (.*)$", re.MULTILINE)


@pytest.mark.parametrize("language", ["cpp", "cu"])
def test_no_weak_symbol_is_defined_twice(root: Path, language: str) -> None:
    """Of two that differ, such as a template's for two structs of one name, one would be lost."""
    objects = sorted((root / "build" / "kernels" / "csrc").glob(f"*/*.{language}.o"))
    nm = shutil.which("nm")
    if not objects or nm is None:
        pytest.skip("no nm here" if nm is None else "no objects of a build here")
    where = defaultdict(set)
    for path in objects:
        listed = subprocess.run([nm, "-C", path], capture_output=True, text=True, check=True)
        for name in DEFINED.findall(listed.stdout):
            if "gcrl_kernels::" in name:
                where[name].add(f"{path.parent.name}/{path.name}")
    assert where, "the objects define something"
    assert {name: places for name, places in where.items() if len(places) > 1} == {}
