"""The report and the comparison of detectors."""
