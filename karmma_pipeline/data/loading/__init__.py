"""From cached tokens to batches: loader, masks, buffers."""
