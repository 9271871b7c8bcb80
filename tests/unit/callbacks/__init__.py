"""What an author of callbacks sees: names, options, messages."""
