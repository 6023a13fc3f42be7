"""A client of xenstore: its wire protocol, a connection, the calls."""
