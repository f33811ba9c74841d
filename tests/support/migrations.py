"""Where the revisions of this repository's own application are: what a complete schema needs beside the library's."""

from workers.app import app

LOCATIONS = app.migration_locations
