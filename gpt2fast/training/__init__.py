"""A run: settings, session, step, optimizer, its folder and its screen."""
