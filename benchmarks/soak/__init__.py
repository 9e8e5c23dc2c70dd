"""The parts of the soak: a service with a record, faults between it and the client, applications, and verdicts."""
