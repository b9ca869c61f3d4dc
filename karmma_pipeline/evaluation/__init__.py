"""Model to report: accuracy and cost on every subset of modalities, tables and pictures."""
