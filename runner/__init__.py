"""The process: launch flags, HTTP, scheduling. Imports `models` and `protocol`; nothing imports this package."""
