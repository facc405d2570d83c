"""The built-in model's checkpoint, with the scripts that made it. Installs as `local_llava.tiny_llava`."""
