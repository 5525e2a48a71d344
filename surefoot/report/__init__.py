"""The report of a run folder: README.md, report.html and plots, in which every number comes from a record."""
