# SPDX-License-Identifier: Apache-2.0
"""Tokenizing speed beside the raw engines: `python tests/bench/tokenize.py --help`. The work is in tokenize_speed.py.

A script's folder comes first on Python's path, and the standard library has a module of this file's name, which
`dataclasses` imports by way of `inspect`. So this file steps aside when it is imported instead of run. The root of the
tree takes the folder's place, for what benchmarks and tests share.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would import what this stands in for
ROOT = os.path.dirname(os.path.dirname(HERE))  # noqa: PTH120
sys.path[:] = [ROOT if os.path.abspath(path) == HERE else path for path in sys.path]  # noqa: PTH100

if __name__ == "__main__":
    import runpy

    runpy.run_path(os.path.join(HERE, "tokenize_speed.py"), run_name="__main__")
elif __name__ == "tokenize":
    del sys.modules["tokenize"]
    import tokenize  # noqa: F401 - the standard library's takes this one's place
