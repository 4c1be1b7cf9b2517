# SPDX-License-Identifier: Apache-2.0
"""Text in, tokens out: JSONL, archives or plain text to a token stream."""
