"""Work beside the path of a webhook: it may be late, and it is never in the way."""
