"""Model zoos and text-weight pairs as `datasets`."""
