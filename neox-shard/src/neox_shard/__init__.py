# SPDX-License-Identifier: Apache-2.0
"""Token streams to .bin/.idx datasets and back: pack, mix, shuffle, cat, info, verify, view."""
