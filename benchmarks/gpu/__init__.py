"""The engine on a GPU, timed; and a model of what bounds it."""
