"""From a data file to fixed-shape batches.

A row passes, in this order: `readers` (a line of a file), `formats` (a conversation or a text), `template` (tokens and
labels), `pipeline` (which runs these stages, and cuts or drops long rows), `store` (flat arrays), `loader` and
`packing` (the rows of a step, and the lines of a micro-batch), `collate` (the batch, with its next-token targets).
The types between them are in `example`.
"""
