"""Quality of Phase 2 beside its peers, and with each of its mechanisms off: `python -m experiments.quality`.

All models share the embedding, the head, the loss, the optimiser, the data and its order; the widths of their
feed-forward parts make them equal in parameters. A run is a line of JSON; `report` makes tables of the lines.
"""
