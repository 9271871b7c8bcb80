"""What other services may ask; field names are those of Atlas where it has the same."""
