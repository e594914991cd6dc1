"""Quality of Phase 2 beside its peers, and with each of its mechanisms off: `python -m experiments.quality`.

All models share the embedding, the head, the loss, the optimiser, the data and its order; the width of the feed-forward
part makes them equal in parameters. A run is a line of JSON; `report` makes tables of the lines.
"""
