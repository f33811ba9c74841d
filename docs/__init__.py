"""The pages, and what makes those that are generated: `./dev docs`."""
