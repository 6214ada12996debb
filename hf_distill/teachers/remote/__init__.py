"""Remote teachers: a teacher that runs on a server."""
