"""Where a figure was measured, and where result files lie. Part of every benchmark."""

from gemma_opt.environment import ROOT, describe

RESULTS = ROOT / "benchmarks" / "results"

__all__ = ["RESULTS", "ROOT", "describe"]
