"""Models: smoltrain's decoder and those of transformers, behind one interface, with the kernels they compute by."""
