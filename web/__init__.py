"""Pages over the same answers: `web.app.create_app`, and reports as one file."""
