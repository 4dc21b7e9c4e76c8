"""Checkpoints of a run and files of weights: written so that none is ever lost, read without running code."""
