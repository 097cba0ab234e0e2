"""Run folder -> one HTML file. It reads what a run wrote and imports no torch."""

from alula.report.build import build_report
from alula.report.summaries import summary

__all__ = ["build_report", "summary"]
