"""Weights from and to other implementations, and the proof that a converted network gives their numbers."""
