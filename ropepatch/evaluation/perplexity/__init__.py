"""Perplexity of whole documents: the windows, the loss of each token, and what the documents together say."""
