# SPDX-License-Identifier: Apache-2.0
"""Generate text from a checkpoint."""
