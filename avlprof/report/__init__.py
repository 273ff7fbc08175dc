"""One HTML file about a run: what was traced, what was found, figures, a policy, how to repeat it."""

from avlprof.report.write import report_html, write_report

__all__ = ["report_html", "write_report"]
