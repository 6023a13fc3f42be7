"""`make torture`: every kind of fault, for as long as it is given, counted."""
