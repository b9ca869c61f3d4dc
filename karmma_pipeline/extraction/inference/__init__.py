"""The frozen networks: inputs in, tokens out."""
