# SPDX-License-Identifier: Apache-2.0
"""The READMEs' command lines work: every `sh` block after a `<!-- test -->` comment is run.

The blocks of one file run in order in one empty directory, as a reader would type them. `<!-- test: slow -->` puts
a file's block among the slow tests; blocks without the comment (clusters, big data) are only shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- test(?P<slow>: slow)? -->\s*\n```sh\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path, *, slow: bool) -> list[str]:
    return [match["body"] for match in BLOCK.finditer(path.read_text()) if slow or not match["slow"]]


READMES = [path for path in sorted([ROOT / "README.md", *ROOT.glob("*/README.md")]) if path.is_file()]
CASES = [
    *(pytest.param(path, False, id=str(path.relative_to(ROOT))) for path in READMES if blocks(path, slow=False)),
    *(
        pytest.param(path, True, id=f"{path.relative_to(ROOT)}-slow", marks=pytest.mark.slow)
        for path in READMES
        if "<!-- test: slow -->" in path.read_text()
    ),
]


@pytest.mark.parametrize(("path", "slow"), CASES)
def test_blocks_run(path: Path, slow: bool, tmp_path: Path) -> None:
    script = "\n".join(["set -euo pipefail", *blocks(path, slow=slow)])
    bin_directory = Path(sys.executable).parent  # where pip put the commands
    run = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(tmp_path / ".torch-extensions"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    shown = f"\n{script}\n--- stdout\n{run.stdout}\n--- stderr\n{run.stderr}"
    assert run.returncode == 0, f"{path.relative_to(ROOT)} exits {run.returncode}{shown}"


def test_some_readme_is_run() -> None:
    assert CASES, "no README has a block to run"
