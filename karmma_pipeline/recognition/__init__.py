"""Trained models at work on raw signals."""
