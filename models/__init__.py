"""The built-in model's directory and the list of models that local-llava knows by name (models.json)."""
