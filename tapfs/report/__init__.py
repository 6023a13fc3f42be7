"""A report about images as one HTML page: pictures of their maps, what is on them, and what a check has found."""
