"""Language models: smoltrain's decoder and those of transformers, behind one interface."""
