# SPDX-License-Identifier: Apache-2.0
"""`python -m neox_gen` is the same as `neox-gen`."""

from neox_gen.cli import main

main()
