"""One run in several processes, started by torchrun: collectives, and the detection of lost processes."""
