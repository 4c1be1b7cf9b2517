# SPDX-License-Identifier: Apache-2.0
"""`python -m neox_shard` is the same as `neox-shard`."""

from neox_shard.cli import main

main()
