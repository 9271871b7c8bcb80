"""What Atlas answers, and what is understood of it."""
