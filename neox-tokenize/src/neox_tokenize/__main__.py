# SPDX-License-Identifier: Apache-2.0
"""`python -m neox_tokenize` is the same as `neox-tokenize`."""

from neox_tokenize.cli import main

main()
