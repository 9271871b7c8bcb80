"""One part of the service with a real database, or one tool of the tests itself."""
