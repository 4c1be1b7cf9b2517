# SPDX-License-Identifier: Apache-2.0
"""`python -m neox_eval` is the same as `neox-eval`."""

from neox_eval.cli import main

main()
