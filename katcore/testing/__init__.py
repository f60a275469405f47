"""Contract classes and fakes for plugin authors."""
