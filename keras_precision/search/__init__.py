"""Searches for the policy of each layer."""

from keras_precision.search.budget import Budget
from keras_precision.search.result import SearchResult
from keras_precision.search.search import search_policy

__all__ = ["Budget", "SearchResult", "search_policy"]
