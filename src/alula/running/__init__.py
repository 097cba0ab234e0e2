"""Whole runs: cells of method x seed over one stream, scored after each task, written to a run folder."""
