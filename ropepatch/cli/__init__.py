"""The command line: one file a verb, heavy imports deferred to the verb that needs them."""
