"""Models: smoltrain's decoder and those of transformers, behind one interface, and the kernels they compute by."""
