"""The commands, one module each: parse -> types -> one call -> print. Their heavy imports are inside the functions."""
