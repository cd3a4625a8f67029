"""Softmax assignment and a linear head's cross-entropy without tokens x codes in memory."""
