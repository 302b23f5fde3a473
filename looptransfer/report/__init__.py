"""Figures of a verdict and of a coordinate check by matplotlib; `looptransfer.write_html` makes the page."""

from looptransfer.report.coordinates import plot_cosines, plot_exponents, plot_growth, plot_stream
from looptransfer.report.figures import plot_curves, plot_optima

__all__ = ["plot_cosines", "plot_curves", "plot_exponents", "plot_growth", "plot_optima", "plot_stream"]
