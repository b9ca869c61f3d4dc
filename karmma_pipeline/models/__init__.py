"""Networks: frozen backbones, the fusion model, saved models. Knows tensors, not files or loops."""
