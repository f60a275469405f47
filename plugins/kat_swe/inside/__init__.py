"""Files that are copied into SWE images and run only there: standard library and pytest alone."""
