# SPDX-License-Identifier: Apache-2.0
"""Several processes: how they find each other (`launch`, no torch) and talk (`group`)."""
