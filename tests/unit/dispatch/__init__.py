"""How calls are decided, shared out and described, without a database."""
