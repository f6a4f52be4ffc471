"""What is made of stored results: tables, plots, Markdown, one HTML page."""
