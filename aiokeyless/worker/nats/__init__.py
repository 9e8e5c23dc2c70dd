"""The engine on NATS JetStream, and the only part of the worker that knows NATS."""
