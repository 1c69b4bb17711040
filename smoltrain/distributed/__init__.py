"""The ranks: their rendezvous, host collectives, stop signals, and the CPU cores of each."""
