"""Downstream tasks: files, examples, loss, predictions and metrics."""
