# SPDX-License-Identifier: Apache-2.0
"""The demo's report card: report.md, loss.png and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("libneox", "torch", "deepspeed", "transformers", "tokenizers", "lm-eval", "numpy", "pyarrow")


def machine() -> str:
    """One line about where this ran."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def plot_loss(metrics: list[dict[str, Any]], unigram: float, path: Path) -> None:
    """Draw the training loss over tokens, with the corpus' unigram entropy as the line to beat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    axes.plot(
        [row["tokens"] for row in metrics], [row["loss"] for row in metrics], linewidth=1.2, label="training loss"
    )
    axes.axhline(unigram, color="grey", linestyle="--", linewidth=1, label="unigram entropy of the corpus")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def sections(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]] | str]]:
    """The report's content: (title, rows of a table) or (title, preformatted text), in order."""
    corpus, train, evals = facts["corpus"], facts["train"], facts["eval"]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    verdicts = [(name, "holds" if held else "FAILS") for name, held in facts["checks"].items()]
    return [
        ("What ran", [("machine", machine()), ("versions", versions), ("finished", facts["finished"])]),
        ("Checks", verdicts),
        (
            "Corpus",
            [
                ("training", f"{corpus['train_files']:,} files, {corpus['train_bytes']:,} bytes"),
                ("held out", f"{corpus['held_out_files']:,} files, {corpus['held_out_bytes']:,} bytes"),
                ("tokens", f"{corpus['tokens']:,} ({corpus['train_bytes'] / corpus['tokens']:.2f} bytes a token)"),
                ("unigram entropy", f"{corpus['unigram_entropy']:.4f} nats a token"),
            ],
        ),
        (
            "Training",
            [
                ("parameters", f"{train['parameters']:,}"),
                ("steps, tokens", f"{train['steps']:,}, {train['tokens']:,}"),
                ("final loss", f"{train['final_loss']:.4f} nats a token (mean of the last 10 steps)"),
                ("below unigram", f"{corpus['unigram_entropy'] - train['final_loss']:.4f} nats"),
                ("speed", f"{train['tokens_per_second']:,.0f} tokens/s (median step)"),
            ],
        ),
        ("Evaluation", [(name, f"{value:.4f}") for name, value in evals.items()]),
        ("Export", [("largest logit difference from transformers", f"{facts['logit_difference']:.2e}")]),
        ("Samples", "\n\n".join(f"--- {i + 1} ---\n{text}" for i, text in enumerate(facts["samples"]))),
        ("Time", [(stage, f"{seconds:.1f} s") for stage, seconds in facts["seconds"].items()]),
        ("Commands", "\n".join(facts["commands"])),
    ]


def write_report(facts: dict[str, Any], folder: Path) -> None:
    """Write report.md and report.html beside loss.png."""
    content = sections(facts)
    (folder / "report.md").write_text(_markdown(content), encoding="utf-8")
    image = base64.b64encode((folder / "loss.png").read_bytes()).decode()
    (folder / "report.html").write_text(_html(content, image), encoding="utf-8")


def _markdown(content: list[tuple[str, list[tuple[str, str]] | str]]) -> str:
    parts = ["# Report card\n\n![loss](loss.png)\n"]
    for title, body in content:
        if isinstance(body, str):
            parts.append(f"## {title}\n\n````\n{body}\n````\n")
        else:
            rows = "".join(f"| {name} | {value.replace('|', chr(92) + '|')} |\n" for name, value in body)
            parts.append(f"## {title}\n\n| | |\n|---|---|\n{rows}")
    return "\n".join(parts)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td { padding: .2rem .8rem .2rem 0; vertical-align: top; }
td:first-child { color: #666; white-space: nowrap; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
img { max-width: 100%; } h2 { border-bottom: 1px solid #ddd; }
"""


def _html(content: list[tuple[str, list[tuple[str, str]] | str]], image: str) -> str:
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Report card</title><style>{STYLE}</style>',
        f'<h1>Report card</h1><img alt="training loss over tokens" src="data:image/png;base64,{image}">',
    ]
    for title, body in content:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        if isinstance(body, str):
            parts.append(f"<pre>{html.escape(body)}</pre>")
        else:
            rows = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in body)
            parts.append(f"<table>{''.join(rows)}</table>")
    return "\n".join([*parts, "</html>\n"])
