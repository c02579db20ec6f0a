"""The suites: one file each, registered under its name."""
