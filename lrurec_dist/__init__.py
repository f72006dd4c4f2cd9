"""LRURec at industrial scale: interaction logs in, a servable sequential recommender out."""

__version__ = "0.1.0"

PAD_ID = 0  # left padding; never a catalogue item
