"""Plugins of other packages. Each module imports the package that it is for, and nothing else imports it."""
