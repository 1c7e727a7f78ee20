"""FLUX.2 klein: text to picture, and editing with reference pictures; distilled to a few steps, or the base model."""
