# SPDX-License-Identifier: Apache-2.0
"""The READMEs' command lines work: every `sh` block after a `<!-- test -->` comment is run.

The blocks of one file run in order in one empty directory, as a reader would type them. `<!-- test: slow -->` puts
a file's block among the slow tests; blocks without the comment (clusters, big data) are only shown. Every option that
is named anywhere must exist.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- test(?P<slow>: slow)? -->\s*\n```sh\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path, *, slow: bool) -> list[str]:
    return [match["body"] for match in BLOCK.finditer(path.read_text()) if slow or not match["slow"]]


# hidden folders are tools' own: pytest's cache has a README
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md"))]
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


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
FOREIGN = {"--jsonl-keys", "--mca", "--signal"}  # of other programs, named in prose
CODE = re.compile(r"`([^`\n]+)`")


@pytest.fixture(scope="module")
def options(run_command: Callable[..., Any]) -> Callable[[str], set[str]]:
    """The options of a command and of all its verbs, as --help lists them."""
    known: dict[str, set[str]] = {}

    def of(command: str) -> set[str]:
        if command not in known:
            text = run_command([command, "--help"]).stdout.decode()
            verbs = re.findall(rf"^\s*{command} ([a-z-]+):", text, re.MULTILINE)
            known[command] = set(OPTION.findall(text)).union(
                *(OPTION.findall(run_command([command, verb, "--help"]).stdout.decode()) for verb in verbs)
            )
        return known[command]

    return of


def named_options(text: str, own: str) -> Iterator[tuple[str, str]]:
    """(command, option) for each option in a README's commands and code; one without a command is that of `own`."""
    for match in FENCED.finditer(text):
        if match["language"] not in ("", "sh") or "-->" in match["body"]:  # the picture is no command line
            continue
        body = match["body"].replace("\\\n", " ")
        for command in re.split(r"\||&&|;|\n|\$\(", re.sub(r"  +#.*", "", body)):
            if found := re.search(r"neox-[a-z]+", command):
                yield from ((found[0], option) for option in OPTION.findall(command[found.end() :]))
    for code in CODE.findall(FENCED.sub("", text)):
        program = code.split(" ")[0]
        if program.startswith(("--", "neox-")):
            yield from ((own if program.startswith("--") else program, option) for option in OPTION.findall(code))


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_named_exists(path: Path, options: Callable[[str], set[str]]) -> None:
    own = path.parent.name if path.parent.name.startswith("neox-") else "neox-train"
    named = {found for found in named_options(path.read_text(), own) if found[1] not in FOREIGN}
    if path.parent.name.startswith("neox-"):
        assert named, "the options are looked for in the wrong way"
    unknown = sorted(f"{command} {option}" for command, option in named if option not in options(command))
    assert not unknown
