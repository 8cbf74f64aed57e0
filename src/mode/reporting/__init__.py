"""Figures to tables, plots and one HTML page; pure functions of `metrics.json` and a few plain records."""
