"""HTTP: the endpoints as data (protocol), exchanges (transport), creation, deletion and redaction."""
