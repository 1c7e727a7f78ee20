"""The wire: requests and answers of the three dialects. pydantic and the standard library; no behaviour, no I/O."""
