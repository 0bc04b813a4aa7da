"""How good a student is: scores with error bars, pictures side by side, and a report of one file."""

from cddistill.evals.report import write_report
from cddistill.evals.table import Row, evaluate, markdown, score

__all__ = ["Row", "evaluate", "markdown", "score", "write_report"]
