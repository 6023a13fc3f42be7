"""The process of one guest's disk: it follows the xenbus states and serves the rings."""
