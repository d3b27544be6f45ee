"""Reports: one HTML page of a Result or of a comparison, to send to a colleague."""
