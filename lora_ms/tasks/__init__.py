"""One file per command, each a composition in reading order."""
