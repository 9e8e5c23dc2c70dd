"""The rules of a wait: pure functions and small state machines, shared by the poller and the worker."""
