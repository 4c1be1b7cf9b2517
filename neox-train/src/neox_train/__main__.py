# SPDX-License-Identifier: Apache-2.0
"""`python -m neox_train` is the same as `neox-train`."""

from neox_train.cli import main

main()
