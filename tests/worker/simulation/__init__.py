"""The simulator of the worker: stories made from seeds, in which processes die at any statement of SQLite."""
