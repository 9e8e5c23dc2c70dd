"""HTTP: the endpoints as data, and the exchanges with the service."""
