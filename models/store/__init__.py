"""Writing models into an Ollama store, in the form that Ollama's own `create` gives them."""

from models.store.create import CreateRequest, create_model
from models.store.policy import QUANT_TYPES

__all__ = ["QUANT_TYPES", "CreateRequest", "create_model"]
