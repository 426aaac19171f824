"""From a data file to fixed-shape batches: readers -> template -> collate -> loader."""
