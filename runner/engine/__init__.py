"""The engine: requests in, outputs out, one tick at a time. Speaks neither HTTP nor a wire format."""
