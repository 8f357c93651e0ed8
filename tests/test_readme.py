"""The README's snippets run as they stand, and its links to files lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "gcrl_kernels" in s])
def test_kernel_snippets_run(snippet: str) -> None:
    exec(compile(snippet, str(README), "exec"), {})


def test_the_snippet_of_a_run_runs(tmp_path, monkeypatch) -> None:
    from tiny_run import save

    (snippet,) = [s for s in SNIPPETS if "gcrl_kernels" not in s]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    save(folder)
    exec(compile(snippet, str(README), "exec"), {})


def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    files = [link for link in links if not link.startswith("http")]
    assert files
    assert [link for link in files if not (README.parent / link).exists()] == []
