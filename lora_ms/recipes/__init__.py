"""What the command line and the Python interface share, in the order of a run."""
