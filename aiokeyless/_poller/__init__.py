"""The waits of one client, in memory."""
