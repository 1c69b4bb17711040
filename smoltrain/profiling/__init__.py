"""`smoltrain profile`: a few real steps under torch's profiler, and where their time went."""
