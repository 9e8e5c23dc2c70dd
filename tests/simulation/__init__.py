"""A simulator that tries to lose an approval: the real client against a model of the service, on a virtual clock."""
