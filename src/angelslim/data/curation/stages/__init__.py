"""One stage a module; its file name is its name in recipes, its `STAGE` the class."""
