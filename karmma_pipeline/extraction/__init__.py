"""Manifest to store: decode the media once, run the frozen backbones, write tokens."""
