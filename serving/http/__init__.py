"""The HTTP server: the application, the bodies that it takes, its page."""
