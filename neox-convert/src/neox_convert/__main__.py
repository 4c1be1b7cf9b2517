# SPDX-License-Identifier: Apache-2.0
"""`python -m neox_convert` is the same as `neox-convert`."""

from neox_convert.cli import main

main()
