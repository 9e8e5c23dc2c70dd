"""HTTP: the endpoints as data (protocol), the exchanges (transport), creating (creation) and redaction."""
